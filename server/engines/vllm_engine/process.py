"""One vLLM engine: processes that are started, watched, and started again when they die.

vLLM's engine core and its workers live in child processes. When one of them dies (out of memory, a kernel that fails, a
kill) all requests on it end with `EngineRestartingError`, and new ones are refused with it until vLLM is there again.
Tries to start it wait longer each time, so that a machine that cannot run it is not kept busy with trying.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import EngineDeadError, EngineRestartingError, ModelLoadError
from ensemble_server.server.engines.shared.backoff import Backoff
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

BACKOFF = Backoff(first_s=1.0, max_s=60.0)
STABLE_S = 60.0  # an engine that lived this long did not die of how it was started
WATCH_S = 0.5  # between two looks at whether it lives
GRACE_S = 10.0  # to end by itself


class VllmProcess:
    """`make` starts vLLM and blocks until it is there (seconds to minutes); `warm` asks it something, since the first
    request takes up to a minute longer than others; `label` names it in the log.

    Made in the event loop that its requests run in; `start` and `stop` are called from other threads.
    """

    def __init__(self, label: str, make: Callable[[], AsyncLLM], warm: Callable[[AsyncLLM], Awaitable[None]]) -> None:
        self.label = label
        self.num_restarts = 0
        self._make = make
        self._warm = warm
        self._loop = asyncio.get_running_loop()
        self._llm: AsyncLLM | None = None
        self._watching: asyncio.Task[None] | None = None
        self._suspected = asyncio.Event()
        self._is_stopping = False
        self._restart_at = 0.0  # monotonic; while there is no engine

    def start(self) -> None:
        """Returns when it is ready. Raises `ModelLoadError` if it does not come up."""
        try:
            llm = self._made()
            asyncio.run_coroutine_threadsafe(self._begin_with(llm), self._loop).result()
        except Exception as exc:
            raise ModelLoadError(f"vLLM did not start for {self.label} ({exc}); its log above has the cause") from exc

    def stop(self) -> None:
        """Live generations end with `EngineDeadError`. Returns when the processes are gone, also those that are only
        being started."""
        self._is_stopping = True
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    @property
    def is_running(self) -> bool:
        return self._llm is not None and not self._llm.errored

    @property
    def llm(self) -> AsyncLLM:
        """The running engine. Raises `EngineRestartingError` while there is none, `EngineDeadError` after `stop`."""
        if self._is_stopping:
            raise EngineDeadError("the engine was stopped")
        if not self.is_running:
            self._suspected.set()
            raise EngineRestartingError(
                f"vLLM for {self.label} has died and is being started again; try again later",
                retry_after_s=max(1.0, self._restart_at - time.monotonic()),
            )
        return self._llm

    def _made(self) -> AsyncLLM:
        """Runs in a thread of its own, since vLLM blocks until its processes are ready.

        They inherit the thread's signal mask: Ctrl-C in a terminal reaches all its processes, and must not end the
        engine before the server has let live requests finish.
        """
        resource_tracker.ensure_running()  # subtle: when it is started it unblocks the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if self._is_stopping:
            raise EngineDeadError("the engine was stopped")
        llm = self._make()
        try:
            asyncio.run_coroutine_threadsafe(self._warm_up(llm), self._loop).result()
        except Exception:
            llm.shutdown()
            raise
        return llm

    async def _warm_up(self, llm: AsyncLLM) -> None:
        if self._is_stopping:
            raise EngineDeadError("the engine was stopped")
        await self._warm(llm)

    async def _begin_with(self, llm: AsyncLLM) -> None:
        if self._is_stopping:
            await _shut_down(llm)
            raise EngineDeadError("the engine was stopped")
        self._llm = llm
        self._watching = asyncio.create_task(self._watch(), name=f"watching vLLM for {self.label}")

    async def _close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await _shut_down(llm)
        for child in multiprocessing.active_children():  # being started: `make` then raises
            if child.name.startswith("EngineCore"):
                child.terminate()

    async def _watch(self) -> None:
        num_failed, started = 0, time.monotonic()
        while True:
            await self._until_it_dies()
            llm, self._llm = self._llm, None
            assert llm is not None, "only `_close` takes it away otherwise, and ends this task first"
            lived_s = time.monotonic() - started
            num_failed = 1 if lived_s > STABLE_S else num_failed + 1
            logger.error("vLLM for %s died after %.0f s; its own log has the cause", self.label, lived_s)
            await _shut_down(llm)
            self._llm = await self._made_again(num_failed)
            started = time.monotonic()

    async def _until_it_dies(self) -> None:
        while self._llm is not None and not self._llm.errored:
            self._suspected.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._suspected.wait()

    async def _made_again(self, num_failed: int) -> AsyncLLM:
        while True:
            delay_s = BACKOFF.delay_s(num_failed, random.random())
            self._restart_at = time.monotonic() + delay_s
            logger.warning("starting vLLM for %s again in %.1f s", self.label, delay_s)
            await asyncio.sleep(delay_s)
            try:
                llm = await in_own_thread(self._made)
            except Exception as exc:
                num_failed += 1
                logger.error("vLLM for %s did not start again: %s", self.label, exc)
            else:
                self.num_restarts += 1
                logger.warning("vLLM for %s runs again", self.label)
                return llm


async def _shut_down(llm: AsyncLLM) -> None:
    """Requests that still wait for it get an error first: vLLM itself would leave them waiting."""
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

    llm.output_processor.propagate_error(VllmDeadError())
    if llm.output_handler is not None:
        llm.output_handler.cancel()  # or it logs the end as a failure
    await in_own_thread(_ended, llm)


def _ended(llm: AsyncLLM) -> None:
    """vLLM kills what has not ended in time, and does not wait for that."""
    manager = llm.engine_core.resources.engine_manager
    processes = [] if manager is None else list(manager.processes)
    llm.shutdown(timeout=GRACE_S)
    for process in processes:
        process.join(GRACE_S)
