"""Who may begin, who is being answered, and how they end: by themselves, with their client, or with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.types import Receive

from ensemble_server.ensembles.errors import EngineDeadError
from ensemble_server.server.api.errors import CLIENT_LEFT

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

T = TypeVar("T")

RETRY_SOON = {"retry-after": "5"}  # seconds


class Admission:
    """The server's door. `is_draining`: it lets nobody in any more."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting
        self._live: set[asyncio.Task[Any]] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False

    def check_open(self) -> None:
        """Raise 503 if the server is shutting down."""
        if self.is_draining:
            raise HTTPException(503, "the server is shutting down", headers=RETRY_SOON)

    def check(self) -> None:
        """Raise 503 unless requests can be answered now."""
        self.check_open()
        if self._hosting.failure is not None:
            raise EngineDeadError(f"the engine is dead: {self._hosting.failure}")

    async def answer(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, unless the client leaves first: then `work` is cancelled, and 499 raised to nobody.

        `work` runs as one task from beginning to end, so it may hold time limits and task groups open across its
        awaits. The request's body must have been read.
        """
        task = asyncio.create_task(work)
        gone = asyncio.create_task(_client_left(receive))
        self._live.add(task)
        self._is_idle.clear()
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise HTTPException(CLIENT_LEFT, "the client left")
            if task.cancelled():
                raise HTTPException(503, "the server is shutting down", headers=RETRY_SOON)
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            self._live.discard(task)
            if not self._live:
                self._is_idle.set()

    @contextmanager
    def live_request(self) -> Iterator[None]:
        """While the block runs its task is a live request: the server's end waits for it, and may cancel it."""
        task = asyncio.current_task()
        assert task is not None, "requests are answered by tasks"
        self._live.add(task)
        self._is_idle.clear()
        try:
            yield
        finally:
            self._live.discard(task)
            if not self._live:
                self._is_idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Let nobody in, wait until all live requests have ended, and cancel those that are not done by `timeout_s`."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            self.cancel_all()
            await self._is_idle.wait()

    def cancel_all(self) -> None:
        """End every live request now, with an error for its client."""
        for task in self._live:
            task.cancel()


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
