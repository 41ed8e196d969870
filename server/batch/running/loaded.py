"""Models that are loaded unless somebody has had enough of waiting for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def opened_unless(stop: asyncio.Event, opening: AbstractAsyncContextManager[T]) -> AsyncIterator[T | None]:
    """What `opening` gives, open while the block runs; None if `stop` was set before: then its opening is cancelled."""
    async with AsyncExitStack() as stack:
        opened = asyncio.create_task(stack.enter_async_context(opening))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({opened, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not opened.done():
                opened.cancel()
                await asyncio.gather(opened, return_exceptions=True)
        yield None if opened.cancelled() else opened.result()
