"""`ensemble batch merge`: the outputs of all shards of a job become the output of the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOME_ROWS_FAILED = 3


def merge(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARD...",
            exists=True,
            dir_okay=False,
            help="What `ensemble batch --shard i/n` wrote: all the JSONL outputs, or all the .job files; in any order.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="JSONL; of .job files, the job file of the whole.")
    ],
) -> None:
    """Join the shards of a job in the input's order, checked to be all rows of one job, each once.

    Merged .job files go on with the command that they came from, without --shard: with -o answers.csv, merge them into
    answers.csv.job and run it; it answers what is pending and writes the table.

    Exit codes: 0 every row has an answer, 1 failed and nothing written, 2 called wrongly, 3 some rows have none.
    """
    from ensemble_server.server.batch.placement.shards import merge_jobs, merge_outputs

    if any(output.exists() and output.samefile(shard) for shard in shards):
        raise typer.BadParameter("would overwrite one of the shards", param_hint="--output")
    are_jobs = {shard.suffix == ".job" for shard in shards}
    if len(are_jobs) > 1:
        raise typer.BadParameter("give either outputs or .job files, not both", param_hint="SHARD")
    merged = (merge_jobs if are_jobs.pop() else merge_outputs)(shards, output)
    failed = merged.num_failed - merged.num_pending
    typer.echo(
        f"{merged.num_rows} rows: {merged.num_rows - merged.num_failed} ok, {failed} failed, {merged.num_pending} "
        f"without an answer; wrote {output}",
        err=True,
    )
    if not merged.is_checked:
        typer.echo(
            "no .job files lie beside the outputs: that no row is missing at their very end could not be checked",
            err=True,
        )
    if merged.num_failed:
        raise typer.Exit(SOME_ROWS_FAILED)
