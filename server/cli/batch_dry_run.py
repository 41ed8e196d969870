"""`ensemble batch --dry-run`: everything that can be wrong is looked for, and what the job will need is estimated."""

from __future__ import annotations

import asyncio

import typer

from ensemble_server.server.batch.file_job import CheckedInput
from ensemble_server.server.batch.job.identity import needed_part
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.running.estimate import Estimate, Probe, PromptCount, evenly_chosen, probe
from ensemble_server.server.batch.running.progress import duration, spend
from ensemble_server.server.cli.batch_answer import BatchRun
from ensemble_server.server.cli.batch_run import check_models, report_bad_rows, report_skipped
from ensemble_server.server.hosting import Hosting

OK, SOMETHING_IS_WRONG = 0, 1


def dry_run_job(run: BatchRun, *, num_probes: int) -> int:
    """Check input, sample submission, config and every body, answer `num_probes` rows, and say what came out.

    Returns the exit code: 1 if a row could not be run. Writes no file.
    """
    checked = run.job.check(run.sample)
    typer.echo(f"{run.job.source}: {checked.num_rows} rows")
    check_models(checked, run.config)
    report_skipped(checked, typer.echo)
    report_bad_rows(checked, typer.echo)
    count, probed = asyncio.run(_measure(run, checked, num_probes))
    _report(count, probed, checked)
    is_wrong = checked.num_bad or count.num_refused or (probed is not None and probed.errors)
    return SOMETHING_IS_WRONG if is_wrong else OK


async def _measure(run: BatchRun, checked: CheckedInput, num_probes: int) -> tuple[PromptCount, Probe | None]:
    count = PromptCount()
    async with Hosting.open(needed_part(run.config, checked.models)) as hosting:
        for row in run.job.rows():
            if isinstance(row, Row):
                count.add(row, hosting)
        rows = evenly_chosen(run.job.rows(), checked.num_rows, num_probes)
        return count, await probe(rows, hosting, seed=run.job.seed) if rows else None


def _report(count: PromptCount, probed: Probe | None, checked: CheckedInput) -> None:
    if count.num_refused:
        typer.echo(f"{count.num_refused} rows would be refused:")
        for message in count.refused:
            typer.echo(f"  {message}")
    if count.num_counted:
        mean = count.num_tokens / count.num_counted
        typer.echo(f"prompts: {count.num_tokens:,} tokens (mean {mean:,.0f}, longest {count.longest:,})")
    if probed is None:
        return
    for message in probed.errors:
        typer.echo(f"a row of the probe failed: {message}")
    typer.echo(f"probe: {len(probed.results)} rows in {duration(probed.elapsed_s)}")
    estimate = Estimate.of(probed, checked.num_rows - checked.num_bad - count.num_refused)
    if estimate is None:
        return
    error = f" ± {estimate.completion_error:,.0f}" if estimate.completion_error is not None else ""
    typer.echo(f"answers: about {estimate.completion_tokens:,.0f}{error} tokens")
    typer.echo(
        f"time: about {duration(estimate.elapsed_s)} at the probe's {len(probed.results)} rows at once; "
        "more rows at once take less"
    )
    if estimate.members:
        typer.echo(f"members read+write: {', '.join(spend(estimate.members))}")
