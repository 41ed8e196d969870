"""Running the job of `ensemble batch`: take the rows in, answer what has no answer, write, and say how it went."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import typer
from rich.console import Console

from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.server.batch.file_job import CheckedInput
from ensemble_server.server.batch.job.identity import model_fingerprints
from ensemble_server.server.batch.job.store import Counts, JobStore
from ensemble_server.server.batch.results.columns import Column
from ensemble_server.server.batch.results.outputs import write_job
from ensemble_server.server.batch.running.failures import MAX_HOPELESS, Reasons
from ensemble_server.server.batch.running.progress import spend
from ensemble_server.server.cli.batch_answer import BatchRun, Ended, answer_on_ray, answer_rows
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.problems import nearest

OK, FAILED, SOME_ROWS_FAILED, INTERRUPTED = 0, 1, 3, 130
NUM_SKIPPED_SHOWN = 5


def run_job(run: BatchRun) -> int:
    """Run the job to its end, its deadline or an interrupt, write its output, and return the exit code.

    Everything that can be wrong with the input is found before a model is loaded.
    """
    # Whatever variables such as FORCE_COLOR make rich believe, a file is no terminal.
    console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    say = _sayer(console)
    checked = run.job.check(run.sample)
    check_models(checked, run.config)
    report_skipped(checked, say)
    report_bad_rows(checked, say)
    is_continued = run.job_file.exists() and not run.restart
    with run.job.open_store(run.job_file, restart=run.restart, extend=run.extend) as store:
        store.bind_models(model_fingerprints(store.model_names(), run.config))
        if store.num_let_go:
            say(f"{store.num_let_go} answers went with rows that have changed or are gone")
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


def check_models(checked: CheckedInput, config: Config) -> None:
    """Refuse to begin what every row would be refused for: no model named where there are several, or unknown ones."""
    names = ", ".join(config.listed)
    if None in checked.models and len(config.listed) != 1:
        raise typer.BadParameter(f"rows name no model; {config.source} serves {names}", param_hint="--model")
    named = {name for name in checked.models if name is not None}
    if named and not named & set(config.models) and None not in checked.models:
        wrong = min(named)
        raise typer.BadParameter(
            f"the rows ask {wrong!r}{nearest(wrong, config.models)}; {config.source} serves {names}."
            f" --set 'model=\"{config.listed[0]}\"' asks another",
            param_hint="--model",
        )


def report_skipped(checked: CheckedInput, say: Callable[[str], None]) -> None:
    if skipped := checked.skipped:
        more = f" and {len(skipped) - NUM_SKIPPED_SHOWN} more" if len(skipped) > NUM_SKIPPED_SHOWN else ""
        shown = ", ".join(skipped[:NUM_SKIPPED_SHOWN])
        say(f"left out of the folder, as hidden or no file: {len(skipped)} ({shown}{more})")


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
    if counts.failed:
        for sentence in Reasons.of(store.failures()).sentences():
            say(f"  {sentence}")
    if spent := spend(store.spent()):
        say(f"members read+wrote: {', '.join(spent)}")
    if ended == "failing":
        return _given_up(run, store, say)
    if ended == "stopped":
        say("interrupted; the same command continues")
        return INTERRUPTED
    if counts.pending or counts.cut:
        say("the deadline passed; the same command continues")
    if counts.failed > checked.num_bad:
        say("--retry-errors runs the failed rows again")
    return SOME_ROWS_FAILED if counts.failed or counts.pending else OK


def _given_up(run: BatchRun, store: JobStore, say: Callable[[str], None]) -> int:
    if run.max_errors:
        why, way_on = f"stopped after {run.max_errors} failed rows (--max-errors)", ""
    else:
        why = f"stopped: {MAX_HOPELESS} rows failed and none was answered"
        way_on = "; --max-errors 0 goes on whatever fails"
    if store.counts().ok:
        say(f"{why}; the job is kept. Mend the cause and run the same command with --retry-errors{way_on}")
    else:
        store.forget_errors()  # the output says what became of them; they were spent on nothing
        say(f"{why}; the job is kept with all its rows. Mend the cause and run the same command again{way_on}")
    return FAILED


def _described(counts: Counts) -> str:
    """ "300 rows: 297 ok (5 cut short), 2 failed, 1 without an answer" """
    cut = f" ({counts.cut} cut short)" if counts.cut else ""
    pending = f", {counts.pending} without an answer" if counts.pending else ""
    return f"{counts.total} rows: {counts.ok} ok{cut}, {counts.failed} failed{pending}"


def _absence(column: Column) -> str:
    return f"column {column.name!r}: no row has {column.source!r}"


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
