"""The limits of keys, at the one place that every request passes: who may ask now, and what is left.

What asks models counts as a request: every POST but those of files and batches, whose rows count instead, and whose
bytes have a limit of their own. To look at something, or to delete it, is free.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_server.ensembles.errors import RateLimitError
from ensemble_server.server.api.errors import refused
from ensemble_server.server.limits.account import Account

LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]
UNCOUNTED = ("/v1/files", "/v1/batches")


class KeepLimits:
    """ASGI layer behind `RequireKey`, which says whose request it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account: Account | None = scope.get("state", {}).get("account")
        if scope["type"] != "http" or account is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["record"].key = account.name
        if scope["method"] != "POST" or scope["path"].startswith(UNCOUNTED):
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        try:
            account.admit()
        except RateLimitError as exc:
            await refused(exc, scope, receive, send_with_limits)
            return
        await self._app(scope, receive, send_with_limits)
