"""API keys: `Authorization: Bearer KEY` (or `X-Api-Key: KEY`) on every path but the open ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_server.server.api.errors import refused

if TYPE_CHECKING:
    from ensemble_server.server.limits.account import Account
    from ensemble_server.server.limits.accounts import Accounts

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/version", "/", "/docs", "/openapi.json"})
OPEN_PREFIXES = ("/ui/", "/docs/")  # files of the page, the same for everybody


class RequireKey:
    """ASGI layer that answers 401 unless a request carries a key that `accounts` knows.

    Whose request it is stands in its state. Without any keys it is everybody's. CORS preflights (OPTIONS) carry no key
    and pass.
    """

    def __init__(self, app: ASGIApp, accounts: Accounts) -> None:
        self._app = app
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if not self._accounts.has_keys:
            state["account"] = self._accounts.everyone
            await self._app(scope, receive, send)
            return
        key = sent_key(Headers(scope=scope))
        if key is not None and (found := self._accounts.of_key(key)) is not None:
            state["owner"], state["account"] = found
            await self._app(scope, receive, send)
            return
        message = "the API key is not valid" if key else "an API key is needed; send 'Authorization: Bearer KEY'"
        await refused(HTTPException(401, message, headers={"www-authenticate": "Bearer"}), scope, receive, send)


def is_open(path: str) -> bool:
    """Whether `path` needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def account_of(request: Request) -> Account | None:
    """Whose limits hold for a request; None for one of an open path."""
    return request.scope.get("state", {}).get("account")


def owner_of(request: Request) -> str:
    """Who asks, for what belongs to a key: a digest of the key; "" for everybody where the server has no keys."""
    return request.scope.get("state", {}).get("owner", "")


def sent_key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")
