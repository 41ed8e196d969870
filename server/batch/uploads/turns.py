"""Whose batch runs next: as many run side by side as there are places, and a place goes to the owner who has fewest."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Places for batches. Among owners who have equally many, who waits longest is next."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._running: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def place(self, owner: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it while the block runs."""
        turn = (owner, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        self._call_next()
        try:
            await turn[1]
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._give_back(owner)  # its turn came in the moment in which it was cancelled
            raise
        try:
            yield
        finally:
            self._give_back(owner)

    def _give_back(self, owner: str) -> None:
        self._num_free += 1
        self._running[owner] -= 1
        self._call_next()

    def _call_next(self) -> None:
        while self._num_free and self._waiting:
            turn = min(self._waiting, key=lambda waiting: self._running[waiting[0]])
            self._waiting.remove(turn)
            self._num_free -= 1
            self._running[turn[0]] += 1
            turn[1].set_result(None)
