"""API keys: `Authorization: Bearer KEY` (or `X-Api-Key: KEY`) on every path but the open ones."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_server.server.api.errors import error_response
from ensemble_server.server.config.blocks import ServerConfig

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/version", "/", "/docs", "/openapi.json"})
OPEN_PREFIXES = ("/ui/", "/docs/")  # files of the page, the same for everybody


def configured_keys(config: ServerConfig) -> list[str]:
    """Keys of the config and of the environment variable it names. Empty: the server is open to all."""
    keys = list(config.api_keys)
    if config.api_keys_env is not None:
        from_environment = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",") if key.strip()]
        if not from_environment and not keys:
            logger.warning("%s holds no key: the server is open to everyone who can reach it", config.api_keys_env)
        keys += from_environment
    return keys


class RequireKey:
    """ASGI layer that answers 401 unless a request carries one of `keys`.

    Digests are compared, all of them, in constant time: how long it takes tells nothing about the keys. CORS preflights
    (OPTIONS) carry no key and pass.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [key_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = sent_key(Headers(scope=scope))
        if key is not None and self._is_known(key):
            scope.setdefault("state", {})["owner"] = hashlib.sha256(b"owner:" + key.encode("latin-1")).hexdigest()
            await self._app(scope, receive, send)
            return
        message = "the API key is not valid" if key else "an API key is needed; send 'Authorization: Bearer KEY'"
        refusal = error_response(HTTPException(401, message, headers={"www-authenticate": "Bearer"}), scope["path"])
        await refusal(scope, receive, send)

    def _is_known(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes as they were sent
        matches = [compare_digest(digest, known) for known in self._digests]
        return any(matches)


def key_digest(key: str) -> bytes:
    """The SHA-256 of a key. A config may give that alone: "sha256:" and 64 hex digits."""
    kind, _, digits = key.partition(":")
    if kind == "sha256" and re.fullmatch(r"[0-9a-f]{64}", digits):
        return bytes.fromhex(digits)
    return hashlib.sha256(key.encode()).digest()


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def owner_of(request: Request) -> str:
    """Who asks, for what belongs to a key: a digest of the key; "" for everybody where the server has no keys."""
    return request.scope.get("state", {}).get("owner", "")


def sent_key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")
