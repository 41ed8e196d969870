"""Where files and batches wait for the disk: in threads of their own, so that no other request stands behind them.

Event loops have one pool for all that blocks, with a handful of threads, and every generation needs one of them for a
moment. A slow disk, or a catalogue that another program holds, must not take them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from ensemble_server.ensembles.errors import StorageBusyError

P = ParamSpec("P")
T = TypeVar("T")

NUM_FILE_THREADS = 4
NUM_WORK_THREADS = 2


class DiskThreads:
    """Three pools: for the catalogue, whose operations wait in turn anyway; for pieces of files that come and go; and
    for the long work of batches. Threads begin when they are needed, and end once nobody holds this any more."""

    def __init__(self) -> None:
        self._catalogue = ThreadPoolExecutor(1, "catalogue")
        self._files = ThreadPoolExecutor(NUM_FILE_THREADS, "batch-files")
        self._work = ThreadPoolExecutor(NUM_WORK_THREADS, "batch-work")
        self.num_waiting = 0  # for the catalogue
        self._busy: tuple[float, StorageBusyError] | None = None  # when the catalogue was last found held, and how

    async def catalogue(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function`, an operation of the catalogue, returns or raises.

        Finding out that it is held takes a moment. All that wait meanwhile are told at once what the first has found.
        """
        asked = time.monotonic()
        self.num_waiting += 1

        def in_turn() -> T:
            if self._busy is not None and asked <= self._busy[0]:
                raise StorageBusyError(str(self._busy[1]))
            try:
                return function(*args, **kwargs)
            except StorageBusyError as exc:
                self._busy = time.monotonic(), exc
                raise

        try:
            return await asyncio.get_running_loop().run_in_executor(self._catalogue, in_turn)
        finally:
            self.num_waiting -= 1

    async def files(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises, which reads or writes a piece of a file."""
        return await asyncio.get_running_loop().run_in_executor(self._files, partial(function, *args, **kwargs))

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises, which may read and write all rows of a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._work, partial(function, *args, **kwargs))
