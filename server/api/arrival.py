"""Bounds on how requests arrive: how long their heads and bodies take, and how much is being read at once.

A connection that sends nothing, or half a request, is closed; a body must come at `MIN_BYTES_PER_S` on the average once
`GRACE_S` are over. What several such clients do together is for a proxy to bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    _Protocol = asyncio.Protocol
else:
    _Protocol = AutoHTTPProtocol

HEAD_S = 20.0  # from a connection, or the first byte of a later request on it, to the end of the request's head
GRACE_S = 30.0
MIN_BYTES_PER_S = 10_000
MAX_READING_BYTES = 256 * 1024**2  # of all bodies that are on their way into memory


class TimelyProtocol(_Protocol):
    """uvicorn's HTTP protocol, for connections that do not keep it waiting."""

    cycle: Any  # uvicorn's: the request that is being answered, or the last one
    transport: Any
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = self.loop.call_later(HEAD_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


async def timely(pieces: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a body as they come. Raises 408 if they come too slowly."""
    clock = asyncio.get_running_loop().time
    end = clock() + GRACE_S
    while True:
        try:
            async with asyncio.timeout_at(end):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            message = f"the body came too slowly: at least {MIN_BYTES_PER_S} bytes a second after {GRACE_S:g} s"
            raise HTTPException(408, message, headers={"connection": "close"}) from exc
        end += len(piece) / MIN_BYTES_PER_S
        yield piece


class Bodies:
    """What is being read, all bodies together."""

    def __init__(self, max_bytes: int = MAX_READING_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """While one body is read: a function to be told of each piece. Raises 503 if all have become too much."""
        held = 0

        def grow(num_bytes: int) -> None:
            nonlocal held
            if self._num_bytes + num_bytes > self._max_bytes:
                raise HTTPException(503, "too much is being read already", headers={"retry-after": "2"})
            held += num_bytes
            self._num_bytes += num_bytes

        try:
            yield grow
        finally:
            self._num_bytes -= held
