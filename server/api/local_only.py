"""Who of this machine may ask a server that has no keys: programs, not web pages.

Every page that somebody opens in a browser runs on this machine, too. Two ways lead from there to an open local server:
a name of the page's own that resolves to 127.0.0.1 (DNS rebinding), which shows in `Host`, and a request that is sent
without asking (a form, a beacon), which shows in `Origin`. A server that listens at all addresses (0.0.0.0) is reached
over loopback in the same ways; whoever asks it over the network has been let in by listening there.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_server.server.api.errors import error_response, shortened

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import ServerConfig

LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"  # pages that run here, where none is named

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def local_only(app: ASGIApp, address: str, config: ServerConfig) -> ASGIApp:
    """`app`, behind `LocalOnly` if it listens at a loopback `address`, or at all, and `config` has no keys."""
    has_keys = bool(config.api_keys or config.keys) or bool(config.api_keys_env and os.environ.get(config.api_keys_env))
    if has_keys or "*" in config.cors_origins:
        return app
    if ip_address(address).is_loopback:
        return LocalOnly(app, config.cors_origins)
    return LocalOnly(app, config.cors_origins, is_open=True) if ip_address(address).is_unspecified else app


def is_loopback_origin(origin: str) -> bool:
    return re.fullmatch(LOOPBACK_ORIGIN, origin) is not None


class LocalOnly:
    """ASGI layer that answers 403 to hosts that are not this machine, and to pages of other sites that send something.

    `origins`: those that the config lets in (`server.cors_origins`), as hosts and as origins; if it names none, pages
    that run on this machine are let in. `is_open`: the network may ask, too. Then only what comes over loopback is
    looked at, where this machine has its own name as well, and numbers, which nobody can bend, are no matter.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], *, is_open: bool = False) -> None:
        self._app = app
        self._is_open = is_open
        self._origins = frozenset(origins)
        own = {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"} if is_open else set()
        self._hosts = {name for name in map(_hostname, origins) if name is not None} | own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_checked = scope["type"] == "http" and (not self._is_open or _comes_over_loopback(scope))
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if is_checked else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(HTTPException(403, refusal), scope["path"])(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _hostname(f"//{host}")
        if not _is_this_machine(name) and name not in self._hosts and not (self._is_open and _is_number(name)):
            where = "has no keys, so on this machine"
            where = where if self._is_open else "listens on this machine only and has no keys, so"
            return (
                f"this server {where} it does not answer to the name {shortened(host, 80)!r}; ask it as 127.0.0.1 or "
                "localhost, name that site in server.cors_origins, or give the server keys (server.api_keys_env)"
            )
        if origin is None or method in _READING or self._is_known(origin) or _site(origin) == host:
            return None
        return (
            f"pages of {shortened(origin, 80)!r} may not send anything to this server; server.cors_origins does not "
            "name that origin"
        )

    def _is_known(self, origin: str) -> bool:
        return origin in self._origins if self._origins else is_loopback_origin(origin)


def _site(origin: str) -> str:
    """ "http://127.0.0.1:8000" -> "127.0.0.1:8000" """
    return origin.partition("://")[2]


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _comes_over_loopback(scope: Scope) -> bool:
    try:
        address = ip_address(scope["client"][0])
    except (TypeError, ValueError):  # no address: a socket of this machine
        return True
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _is_number(name: str | None) -> bool:
    try:
        return name is not None and ip_address(name) is not None
    except ValueError:
        return False


def _is_this_machine(name: str | None) -> bool:
    """127.0.0.1, [::1], localhost, api.localhost"""
    if name is None:
        return False
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.rstrip(".") == "localhost" or name.rstrip(".").endswith(".localhost")
