"""One member in memory at a time: load it, have it answer all that the rows want of it, free it, take the next.

An ensemble of texts is run over a log of its members' answers (`server.batch.placement.call_log`). What is not in the
log is noted; then each member is loaded once and makes all its noted calls; then the ensemble is run again, now to its
end. A judge or an aggregator reads the members' answers, so its calls come up in the second round. The methods' code is
the same as ever, and knows nothing of this.

    round 1   rows -> calls of the members      load base, answer, free; load code, answer, free; ...
    round 2   rows -> calls of the aggregator   load it, answer, free
    round 3   rows -> answers

Killed at any moment, the next run finds the calls that were answered in the log. Members that stand on the same weights
(adapters, other system prompts) are loaded together. What cannot work this way says why (`check_can_be_sequential`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from ensemble_server.ensembles.base import Answer, collect
from ensemble_server.ensembles.errors import DeadlineError, EngineDeadError, EnsembleError, OverloadedError
from ensemble_server.server.batch.job.identity import model_fingerprints, seeded
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.placement.call_log import Call, CallLog, NotRecordedError
from ensemble_server.server.batch.placement.phases import Phase, check_can_be_sequential, phases
from ensemble_server.server.batch.placement.replayed_hosting import replayed_hosting
from ensemble_server.server.batch.running.answering import answer as answer_row
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.running.loaded import opened_unless
from ensemble_server.server.batch.running.room import num_sequences
from ensemble_server.server.batch.running.runner import Summary
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.hosting import Hosting

ROWS_AT_ONCE = 256
_noted: ContextVar[list[Call]] = ContextVar("calls that the row being answered wants and that have no answer yet")


async def run_sequential(
    store: JobStore,
    config: Config,
    log: CallLog,
    *,
    concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    is_over: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    watch: FailureWatch | None = None,
) -> Summary:
    """Answer every pending row of `store`, with one phase of the models in memory at a time.

    Errors of rows are results. `stop`: set it to end soon. `is_over`: whether a deadline has passed; then no more calls
    begin, members that were not asked count as silent, and what comes of that is kept as cut: it runs again when the
    job is continued. `say` is told of every phase. `watch` sees calls of members that fail, and rows that end; once it
    is over for it no more is asked. Raises `ConfigError` if a model that rows name cannot run this way,
    and what loading a model raises. Continue with the same call.
    """
    began = time.monotonic()
    names = tuple(model_fingerprints(store.model_names(), config))
    for name in names:
        check_can_be_sequential(config, name)
    await asyncio.to_thread(store.bind_models, model_fingerprints(store.model_names(), config))
    await asyncio.to_thread(log.forget_errors)
    watch = watch or FailureWatch(max_errors=0)
    run = _SequentialRun(store, config, log, names, concurrency, stop or asyncio.Event(), is_over, say, watch)
    while await run.next_round():
        pass
    counts = store.counts()
    is_done = not counts.pending and not counts.cut
    return Summary(
        "finished" if is_done else "failing" if watch.is_over else "deadline" if is_over() else "stopped",
        counts,
        run.prompt_tokens,
        run.completion_tokens,
        store.spent(),
        time.monotonic() - began,
    )


class _SequentialRun:
    def __init__(
        self,
        store: JobStore,
        config: Config,
        log: CallLog,
        names: Sequence[str],
        concurrency: int | None,
        stop: asyncio.Event,
        is_over: Callable[[], bool],
        say: Callable[[str], None],
        watch: FailureWatch,
    ) -> None:
        self._store = store
        self._config = config
        self._log = log
        self._phases = phases(config, names)
        self._concurrency = concurrency
        self._stop = stop
        self._is_over = is_over
        self._say = say
        self._watch = watch
        self._is_late = False  # rows get the best that the log has
        self._replayed = replayed_hosting(config, names, log, self._note)
        self.prompt_tokens = 0  # of the rows that were answered
        self.completion_tokens = 0

    async def next_round(self) -> bool:
        """Answer the calls that are noted, then run the rows over the log. Returns whether there is more to do."""
        for phase in self._phases:
            if not self._must_end:
                await self._load_and_answer(phase)
        if self._stop.is_set() or self._watch.is_over:
            return False
        self._is_late = self._is_over()
        return await self._replay() > 0 and not self._is_late

    @property
    def _must_end(self) -> bool:
        return self._stop.is_set() or self._watch.is_over or self._is_over()

    def _note(self, call: Call) -> None:
        _noted.get().append(call)
        if self._is_late:
            raise DeadlineError(f"member {call.model!r} was not asked before the deadline")

    # --- phases: models answer calls ---

    async def _load_and_answer(self, phase: Phase) -> None:
        num_open = await asyncio.to_thread(self._log.num_open, phase.models)
        if not num_open:
            return
        self._say(f"loading {', '.join(phase.models)} for {num_open} calls")
        async with opened_unless(self._stop, Hosting.open(excerpt(self._config, phase.models))) as hosting:
            if hosting is None:
                return
            page_size = 2 * (self._concurrency or num_sequences(hosting))
            while not self._must_end:
                calls = await asyncio.to_thread(self._log.open_calls, phase.models, limit=page_size)
                if not calls:
                    break
                results = await asyncio.gather(*(_answered(hosting, call) for call in calls))
                if hosting.failure is not None:
                    raise EngineDeadError(hosting.failure)
                await asyncio.to_thread(self._log.record, results)
                self._look_at_calls(results)
        del hosting
        _free_memory()

    def _look_at_calls(self, results: Sequence[tuple[bytes, Answer | EnsembleError]]) -> None:
        for _, result in results:
            if isinstance(result, EnsembleError):
                self._watch.failed("of a member", {"error": {"message": str(result)}})
            else:
                self._watch.answered()

    # --- rows over the log ---

    async def _replay(self) -> int:
        """Answer the pending rows that can be answered; note what the others want. Returns how many calls are new."""
        num_noted, after = 0, -1
        with _quiet_about_missing_calls():
            while rows := await asyncio.to_thread(self._store.pending, after, limit=ROWS_AT_ONCE, has_cut=True):
                outcomes = await asyncio.gather(*(self._over_the_log(row) for row in rows))
                noted = {call.key: call for _, calls in outcomes for call in calls}
                await asyncio.to_thread(self._log.note, noted.values())
                results = [(row.index, result) for row, (result, _) in zip(rows, outcomes, strict=True) if result]
                await asyncio.to_thread(self._store.record, results)
                self._look_at_rows(rows, outcomes)
                self._count(result for _, result in results)
                num_noted += len(noted)
                after = rows[-1].index
        counts = self._store.counts()
        self._say(f"{counts.ok + counts.failed} of {counts.total} rows are done, {num_noted} calls to make")
        return num_noted

    def _look_at_rows(self, rows: Sequence[Row], outcomes: Sequence[tuple[RowResult | None, list[Call]]]) -> None:
        for row, (result, _) in zip(rows, outcomes, strict=True):
            if result is not None and not result.is_ok:
                self._watch.failed(row.custom_id, result.body)

    async def _over_the_log(self, row: Row) -> tuple[RowResult | None, list[Call]]:
        """The row's result, or None and the calls that it waits for."""
        noted: list[Call] = []

        async def answered() -> RowResult | None:
            _noted.set(noted)  # in this task's context, which the tasks of the ensembles below it copy
            try:
                return await answer_row(self._replayed, seeded(row, self._store.identity.seed))
            except NotRecordedError:
                return None

        result = await asyncio.create_task(answered())
        if self._is_late and noted and result is not None and result.is_ok:
            return replace(result, is_cut=True), noted
        return (None, noted) if noted else (result, [])

    def _count(self, results: Iterable[RowResult]) -> None:
        for result in results:
            usage = result.body.get("usage", {})
            self.prompt_tokens += usage.get("prompt_tokens", 0)
            self.completion_tokens += usage.get("completion_tokens", 0)


async def _answered(hosting: Hosting, call: Call) -> tuple[bytes, Answer | EnsembleError]:
    while True:
        try:
            return call.key, await collect(hosting.models[call.model], replace(call.request, priority=1))
        except OverloadedError as exc:
            await asyncio.sleep(exc.retry_after_s)
        except EnsembleError as exc:
            return call.key, exc


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # remote members do without it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet_about_missing_calls() -> Iterator[None]:
    """A call that is only being noted is no member that failed, of which the log need hear."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(isinstance(value, NotRecordedError) for value in record.args or ())

    logger = logging.getLogger("ensemble_server.ensembles.fan_out")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
