"""Server-sent events as OpenAI's and Anthropic's clients read them.

    data: {...}\\n\\n   one chunk        : ...\\n\\n   a comment, so that nobody on the way closes a silent connection
    data: [DONE]\\n\\n   the end          event: name\\ndata: {...}\\n\\n   one event of a protocol that names them

Until the first chunk is there nothing is sent: an error is then an ordinary JSON answer with its status. Once a stream
has begun an error is an event; of chunks `data: {"error": {...}}`, and `[DONE]` follows it.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ensemble_server.server.api.admission import Admission
from ensemble_server.server.api.errors import CLIENT_LEFT, error_object, log_failure
from ensemble_server.server.requests.errors import ErrorObject

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class Framing(Protocol):
    """How one protocol writes its streams. `end`: what closes one that has not failed."""

    end: bytes

    def event(self, data: Mapping[str, Any]) -> bytes: ...

    def failure(self, error: ErrorObject) -> bytes:
        """What ends a stream that an error has broken off."""
        ...


class Chunks:
    """Of chats and completions."""

    end = DONE

    def event(self, data: Mapping[str, Any]) -> bytes:
        return event(data)

    def failure(self, error: ErrorObject) -> bytes:
        return event({"error": error}) + DONE


class NamedEvents:
    """Each event's `type` is its name. `failed`: the events that an error becomes."""

    end = b""

    def __init__(self, failed: Callable[[ErrorObject], Iterable[Mapping[str, Any]]]) -> None:
        self._failed = failed

    def event(self, data: Mapping[str, Any]) -> bytes:
        return b"event: " + data["type"].encode() + b"\n" + event(data)

    def failure(self, error: ErrorObject) -> bytes:
        return b"".join(map(self.event, self._failed(error)))


def _counted(scope: Scope) -> AbstractContextManager[None]:
    """While it streams an answer is one of its key's. Raises `RateLimitError` if that has as many as it may."""
    account = scope["state"].get("account")
    return nullcontext() if account is None else account.stream()


class EventStream(Response):
    """Sends `chunks` as they come, each as an event, and then the stream's end.

    The generator runs in one task and is closed when that ends, however it ends. A comment goes out every
    `keep_alive_interval_s` seconds of silence; the first begins the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Mapping[str, Any]],
        admission: Admission,
        *,
        keep_alive_interval_s: float,
        headers: Mapping[str, str],
        framing: Framing | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._chunks = chunks
        self._framing = framing or Chunks()
        self._admission = admission
        self._interval_s = keep_alive_interval_s
        self._has_begun = False
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with _counted(scope):
                await self._admission.answer(receive, self._play(send))
        except Exception as exc:
            if not self._has_begun:
                raise
            kind, error = error_object(exc)
            scope["state"]["record"].error = error["code"] or type(exc).__name__
            if kind.status == CLIENT_LEFT:
                return
            log_failure("stream", exc, kind)
            await self._send(send, self._framing.failure(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _play(self, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        ticking = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send(send, self._framing.event(chunk))
            if self._framing.end:
                await self._send(send, self._framing.end)
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _keep_alive(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            silent_s = clock() - self._last_sent
            if silent_s >= self._interval_s:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._interval_s - silent_s)

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._sending:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._last_sent = asyncio.get_running_loop().time()
