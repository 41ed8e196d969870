"""Running the job of `ensemble batch`: take the rows in, answer what has no answer, write, and say how it went."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ensembles.errors import EnsembleError
from server.batch.budget import TimeBudget
from server.batch.columns import Column
from server.batch.file_job import CheckedInput, FileJob
from server.batch.identity import model_fingerprints
from server.batch.outputs import OutputForm, write_job
from server.batch.progress import ProgressView, duration, spend
from server.batch.store import Counts, JobStore
from server.batch.submission import SampleSubmission
from server.config import Config

if TYPE_CHECKING:
    from server.batch.runner import Summary
    from server.hosting import Hosting

OK, SOME_ROWS_FAILED, INTERRUPTED = 0, 3, 130


@dataclass(frozen=True)
class BatchRun:
    """One call of the command. `sample`: what the output's ids are held against.

    `deadline_s`, `time_budget_s`: seconds from `began_s` (`time.monotonic`), so that loading models counts too. The
    budget is shared out among the rows, of which none may take more than `per_row_max_s`.
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
    has_progress: bool = True

    def left_s(self, limit_s: float | None) -> float | None:
        """What is left of a limit; 0 if nothing is."""
        return None if limit_s is None else max(0.0, self.began_s + limit_s - time.monotonic())


def run_job(run: BatchRun) -> int:
    """Run the job to its end, its deadline or an interrupt, write its output, and return the exit code.

    Everything that can be wrong with the input is found before a model is loaded.
    """
    console = Console(stderr=True)
    say = _sayer(console)
    checked = run.job.check(run.sample)
    report_bad_rows(checked, say)
    is_continued = run.job_file.exists() and not run.restart
    with run.job.open_store(run.job_file, restart=run.restart) as store:
        store.bind_models(model_fingerprints(store.model_names(), run.config))
        if run.retry_errors:
            say(f"{store.forget_errors()} failed rows run again")
        counts = store.counts()
        if not counts.pending and not counts.cut:
            say(f"this job is finished: {run.job_file}")
            return _write(run, store, checked, "finished", say)
        if is_continued:
            say(f"continues {run.job_file}: {counts.ok + counts.failed} of {counts.total} rows are done")
        try:
            summary = asyncio.run(_answer(run, store, console))
        except EnsembleError:
            write_job(store, run.job.recipe.grid, run.output, run.form)  # the best so far; the error says the rest
            raise
        say(_speed(summary))
        return _write(run, store, checked, summary.ended, say)


def report_bad_rows(checked: CheckedInput, say: Callable[[str], None]) -> None:
    if checked.num_bad:
        say(f"{checked.num_bad} of {checked.num_rows} rows cannot be run and will be errors in the output:")
        for message in checked.bad:
            say(f"  {message}")
        if checked.num_bad > len(checked.bad):
            say(f"  and {checked.num_bad - len(checked.bad)} more")


async def _answer(run: BatchRun, store: JobStore, console: Console) -> Summary:
    from server.batch.runner import run as run_rows
    from server.hosting import Hosting

    stop = asyncio.Event()
    with ProgressView(console, is_shown=run.has_progress) as view, _stopping(stop, view.say):
        async with Hosting.open(run.config) as hosting:
            limits = [left for limit in (run.deadline_s, run.time_budget_s) if (left := run.left_s(limit)) is not None]
            return await run_rows(
                store,
                hosting,
                concurrency=run.concurrency,
                deadline_s=min(limits, default=None),
                budget=_budget(run, store, hosting),
                stop=stop,
                on_progress=view.update,
            )


def _budget(run: BatchRun, store: JobStore, hosting: Hosting) -> TimeBudget | None:
    """How the rows share the time; None if nothing limits them one by one."""
    from server.batch.room import num_sequences, sequences_of

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


def _write(run: BatchRun, store: JobStore, checked: CheckedInput, ended: str, say: Callable[[str], None]) -> int:
    """Write the output, say what is in it, and return the exit code."""
    if run.sample is not None:
        run.sample.check_ids(lambda: (stored.row.custom_id for stored in store.rows()))
    report = write_job(store, run.job.recipe.grid, run.output, run.form)
    counts = store.counts()
    say(f"{_described(counts)}; wrote {run.output}")
    if report is not None and report.num_filled:
        filled = f"took the fallback {run.form.fallback!r}" if run.form.fallback else "are blank"
        say(f"warning: {report.num_filled} of {report.num_rows} rows have no answer and {filled}")
    for column in report.absent if report is not None else ():
        say(f"warning: {_absence(column)}")
    if spent := spend(store.spent()):
        say(f"members read+wrote: {', '.join(spent)}")
    if ended == "stopped":
        say("interrupted; the same command continues")
        return INTERRUPTED
    if counts.pending or counts.cut:
        say("the deadline passed; the same command continues")
    if counts.failed > checked.num_bad:
        say("--retry-errors runs the failed rows again")
    return SOME_ROWS_FAILED if counts.failed or counts.pending else OK


def _described(counts: Counts) -> str:
    """ "300 rows: 297 ok (5 cut short), 2 failed, 1 without an answer" """
    cut = f" ({counts.cut} cut short)" if counts.cut else ""
    pending = f", {counts.pending} without an answer" if counts.pending else ""
    return f"{counts.total} rows: {counts.ok} ok{cut}, {counts.failed} failed{pending}"


def _speed(summary: Summary) -> str:
    num_written = summary.completion_tokens
    rate = f" ({num_written / summary.elapsed_s:,.0f} tokens/s)" if num_written and summary.elapsed_s > 0 else ""
    return f"read {summary.prompt_tokens:,} tokens and wrote {num_written:,} in {duration(summary.elapsed_s)}{rate}"


def _absence(column: Column) -> str:
    return f"column {column.name!r}: no row has {column.source!r}"


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
