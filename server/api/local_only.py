"""Who may ask a server that listens on this machine only and has no keys: programs of this machine, not web pages.

Every page that somebody opens in a browser runs on this machine, too. Two ways lead from there to an open local server:
a name of the page's own that resolves to 127.0.0.1 (DNS rebinding), which shows in `Host`, and a request that is sent
without asking (a form, a beacon), which shows in `Origin`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from ipaddress import ip_address
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
    """`app`, behind `LocalOnly` if it listens at a loopback `address` and `config` has no keys."""
    has_keys = bool(config.api_keys or config.keys) or bool(config.api_keys_env and os.environ.get(config.api_keys_env))
    if has_keys or not ip_address(address).is_loopback or "*" in config.cors_origins:
        return app
    return LocalOnly(app, config.cors_origins)


def is_loopback_origin(origin: str) -> bool:
    return re.fullmatch(LOOPBACK_ORIGIN, origin) is not None


class LocalOnly:
    """ASGI layer that answers 403 to hosts that are not this machine, and to pages of other sites that send something.

    `origins`: those that the config lets in (`server.cors_origins`), as hosts and as origins; if it names none, pages
    that run on this machine are let in.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(HTTPException(403, refusal), scope["path"])(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _hostname(f"//{host}")
        if not _is_this_machine(name) and name not in self._hosts:
            return (
                f"this server listens on this machine only and has no keys, so it does not answer to the name "
                f"{shortened(host, 80)!r}; ask it as 127.0.0.1 or localhost, or give it keys (server.api_keys_env)"
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


def _is_this_machine(name: str | None) -> bool:
    """127.0.0.1, [::1], localhost, api.localhost"""
    if name is None:
        return False
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.rstrip(".") == "localhost" or name.rstrip(".").endswith(".localhost")
