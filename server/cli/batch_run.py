"""Running the job of `ensemble batch`: take the rows in, answer what has no answer, write, and say how it went."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.console import Console

from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.server.batch.file_job import CheckedInput
from ensemble_server.server.batch.job.identity import model_fingerprints
from ensemble_server.server.batch.job.store import Counts, JobStore
from ensemble_server.server.batch.results.columns import Column
from ensemble_server.server.batch.results.outputs import write_job
from ensemble_server.server.batch.running.progress import spend
from ensemble_server.server.cli.batch_answer import BatchRun, Ended, answer_on_ray, answer_rows

OK, SOME_ROWS_FAILED, INTERRUPTED = 0, 3, 130


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
            if run.ray_workers is not None:
                ended = answer_on_ray(run, store, console)
            else:
                ended = asyncio.run(answer_rows(run, store, console))
        except EnsembleError:
            write_job(store, run.job.recipe.grid, run.output, run.form)  # the best so far; the error says the rest
            raise
        except asyncio.CancelledError:
            say("interrupted at once; the same command continues")
            return INTERRUPTED
        return _write(run, store, checked, ended, say)


def report_bad_rows(checked: CheckedInput, say: Callable[[str], None]) -> None:
    if checked.num_bad:
        say(f"{checked.num_bad} of {checked.num_rows} rows cannot be run and will be errors in the output:")
        for message in checked.bad:
            say(f"  {message}")
        if checked.num_bad > len(checked.bad):
            say(f"  and {checked.num_bad - len(checked.bad)} more")


def _write(run: BatchRun, store: JobStore, checked: CheckedInput, ended: Ended, say: Callable[[str], None]) -> int:
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


def _absence(column: Column) -> str:
    return f"column {column.name!r}: no row has {column.source!r}"


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
