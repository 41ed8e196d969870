"""Several streams read at the same time, their items as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

MAX_AHEAD = 64  # items that nobody has taken yet; then the streams wait

T = TypeVar("T")
Opener = Callable[[], AsyncGenerator[T, None]]  # streams are opened when it is their turn


async def side_by_side(
    openers: Sequence[Opener[T]], *, at_once: int | None = None, deadline: float | None = None
) -> AsyncGenerator[tuple[int, T], None]:
    """(place of the stream, item) of all streams; at most `at_once` of them are open at a time, in their order.

    The first error of a stream ends all and is raised here; `TimeoutError` when the event loop's time is `deadline`.
    However it ends, also by being closed, every stream is closed when it has.
    """
    if len(openers) == 1:  # without a task in between
        async with aclosing(openers[0]()) as stream:
            while True:
                async with asyncio.timeout_at(deadline):
                    try:
                        item = await anext(stream)
                    except StopAsyncIteration:
                        return
                yield 0, item

    arrived: asyncio.Queue[tuple[int, T] | _Ended] = asyncio.Queue()
    room = asyncio.Semaphore(MAX_AHEAD)
    turn = asyncio.Semaphore(at_once or len(openers) or 1)

    async def pump(place: int) -> None:
        async with turn, aclosing(openers[place]()) as stream:
            async for item in stream:
                await room.acquire()
                arrived.put_nowait((place, item))

    def ended(task: asyncio.Task[None]) -> None:
        arrived.put_nowait(_Ended(None if task.cancelled() else task.exception()))

    tasks: list[asyncio.Task[None]] = []
    try:
        for place in range(len(openers)):
            tasks.append(asyncio.create_task(pump(place)))
            tasks[-1].add_done_callback(ended)
        num_live = len(tasks)
        while num_live:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await arrived.get()
            except TimeoutError:
                if arrived.empty():
                    raise
                item = arrived.get_nowait()  # what came in time is handed out first
            if isinstance(item, _Ended):
                num_live -= 1
                if item.error is not None:
                    raise item.error
                continue
            room.release()
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Ended:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
