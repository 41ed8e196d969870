"""Where blocking torch work runs: each piece in a thread of its own that ends with it.

OpenMP keeps a team of workers for every thread that ever ran a parallel operator. Once all teams together have more
threads than there are cores, libgomp's barriers sleep instead of spinning, in every team. On 2 cores a decode step of
the engine took 72 to 89 ms instead of 51 to 63, and one of 16 rows 142 to 163 instead of 83 to 108, for as long as a
thread that had loaded the weights lived on, idle. So the engine's is the only thread with a team that stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_unfinished: set[Future[Any]] = set()


async def in_own_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns or raises. If the caller is cancelled the thread ends when the function does."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=function.__name__)
    try:
        future = thread.submit(partial(function, *args, **kwargs))
        _unfinished.add(future)
        future.add_done_callback(_unfinished.discard)
        return await asyncio.wrap_future(future)
    finally:
        thread.shutdown(wait=False)


def has_unfinished_threads() -> bool:
    """Whether a thread still works on what nobody waits for any more. An interpreter that ends waits for it."""
    return bool(_unfinished)
