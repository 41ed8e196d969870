"""How the rows of `ensemble batch` are answered: with all models in memory, or with one member there at a time."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from ensemble_server.server.batch.file_job import FileJob
from ensemble_server.server.batch.job.identity import model_fingerprints, needed_part
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.results.outputs import OutputForm
from ensemble_server.server.batch.results.submission import SampleSubmission
from ensemble_server.server.batch.running.budget import TimeBudget
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.running.progress import ProgressView, duration
from ensemble_server.server.config.blocks import Config

if TYPE_CHECKING:
    from ensemble_server.server.batch.running.runner import Summary
    from ensemble_server.server.hosting import Hosting

Ended = Literal["finished", "deadline", "stopped", "failing"]


@dataclass(frozen=True)
class BatchRun:
    """One call of the command. `sample`: what the output's ids are held against.

    `deadline_s`, `time_budget_s`: seconds from `began_s` (`time.monotonic`), so that loading models counts too. The
    budget is shared out among the rows, of which none may take more than `per_row_max_s`. `is_sequential`: one member
    is in memory at a time; then rows are not limited one by one. `ray_workers`: answered by so many workers of Ray.
    `max_errors`: see `FailureWatch`. `extend`: see `FileJob.open_store`.
    """

    config: Config
    job: FileJob
    job_file: Path
    output: Path
    form: OutputForm
    sample: SampleSubmission | None = None
    concurrency: int | None = None
    deadline_s: float | None = None
    time_budget_s: float | None = None
    per_row_max_s: float | None = None
    began_s: float = field(default_factory=time.monotonic)
    retry_errors: bool = False
    restart: bool = False
    extend: bool = False
    max_errors: int | None = None
    has_progress: bool = True
    is_sequential: bool = False
    ray_workers: int | None = None

    def left_s(self, limit_s: float | None) -> float | None:
        """What is left of a limit; 0 if nothing is."""
        return None if limit_s is None else max(0.0, self.began_s + limit_s - time.monotonic())


async def answer_rows(run: BatchRun, store: JobStore, console: Console) -> Ended:
    """Answer what has no answer yet. The first Ctrl-C ends this in order, the second raises `CancelledError`."""
    stop = asyncio.Event()
    with ProgressView(console, is_shown=run.has_progress) as view, _stopping(stop, view.say):
        if run.is_sequential:
            summary = await _member_by_member(run, store, stop, view.say)
        else:
            summary = await _resident(run, store, stop, view)
    view.say(_speed(summary))
    return summary.ended


async def _resident(run: BatchRun, store: JobStore, stop: asyncio.Event, view: ProgressView) -> Summary:
    from ensemble_server.server.batch.running.loaded import opened_unless
    from ensemble_server.server.batch.running.runner import Summary
    from ensemble_server.server.batch.running.runner import run as run_rows
    from ensemble_server.server.hosting import Hosting

    needed = needed_part(run.config, store.model_names())
    async with opened_unless(stop, Hosting.open(needed, on_load=view.loading)) as hosting:
        if hosting is None:
            return Summary("stopped", store.counts(), 0, 0, store.spent(), 0.0)
        limits = [left for limit in (run.deadline_s, run.time_budget_s) if (left := run.left_s(limit)) is not None]
        return await run_rows(
            store,
            hosting,
            concurrency=run.concurrency,
            deadline_s=min(limits, default=None),
            budget=_budget(run, store, hosting),
            stop=stop,
            on_progress=view.update,
            watch=FailureWatch(view.say, run.max_errors),
            say=view.say,
        )


async def _member_by_member(run: BatchRun, store: JobStore, stop: asyncio.Event, say: Callable[[str], None]) -> Summary:
    """What members answered is kept beside the job, as JOB.calls, for the rounds after and for other jobs."""
    from ensemble_server.server.batch.placement.call_log import CallLog
    from ensemble_server.server.batch.placement.memory_estimate import estimated_memory
    from ensemble_server.server.batch.placement.phases import check_can_be_sequential
    from ensemble_server.server.batch.placement.sequential import run_sequential

    names = list(model_fingerprints(store.model_names(), run.config))
    for name in names:
        check_can_be_sequential(run.config, name)
    for sentence in estimated_memory(run.config, names).sentences():
        say(sentence)
    with CallLog.open(run.job_file.with_name(f"{run.job_file.name.removesuffix('.job')}.calls")) as log:
        return await run_sequential(
            store,
            run.config,
            log,
            concurrency=run.concurrency,
            stop=stop,
            is_over=lambda: run.left_s(run.deadline_s) == 0,
            say=say,
            watch=FailureWatch(say, run.max_errors),
        )


def answer_on_ray(run: BatchRun, store: JobStore, console: Console) -> Ended:
    """Answer what has no answer yet on a cluster. Ctrl-C raises `KeyboardInterrupt`; what has come back is kept."""
    from ensemble_server.server.batch.placement.ray_data import RayOptions, run_on_ray

    assert run.ray_workers is not None, "asked of runs on Ray only"
    with ProgressView(console, is_shown=run.has_progress) as view:
        watch = FailureWatch(view.say, run.max_errors)
        options = RayOptions(workers=run.ray_workers)
        needed = needed_part(run.config, store.model_names())
        summary = run_on_ray(store, needed, options, on_progress=view.update, watch=watch)
    view.say(_speed(summary))
    return summary.ended


def _budget(run: BatchRun, store: JobStore, hosting: Hosting) -> TimeBudget | None:
    """How the rows share the time; None if nothing limits them one by one."""
    from ensemble_server.server.batch.running.room import num_sequences, sequences_of

    if run.time_budget_s is None and run.per_row_max_s is None:
        return None
    first = next(iter(store.pending(limit=1, has_cut=True)), None)
    num_places = 1 if first is None else sequences_of(first, hosting)
    at_once = run.concurrency or max(1, num_sequences(hosting) // num_places)
    return TimeBudget(run.left_s(run.time_budget_s), at_once=at_once, per_row_max_s=run.per_row_max_s)


@contextmanager
def _stopping(stop: asyncio.Event, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) sets `stop`, the second cancels the task that is in this block."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "runs inside a task"

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
        else:
            say("stopping; what is done is kept. Once more stops at once.")
            stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _speed(summary: Summary) -> str:
    num_written = summary.completion_tokens
    rate = f" ({num_written / summary.elapsed_s:,.0f} tokens/s)" if num_written and summary.elapsed_s > 0 else ""
    return f"read {summary.prompt_tokens:,} tokens and wrote {num_written:,} in {duration(summary.elapsed_s)}{rate}"
