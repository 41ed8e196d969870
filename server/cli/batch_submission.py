"""`ensemble batch submission`: a table from results that are there already, of a batch or of a vote on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ensemble_server.server.batch.results.columns import Column

SOME_ROWS_FAILED = 3


def submission(
    results: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, metavar="RESULTS", help="JSONL that `batch`, `batch merge` or `vote` wrote."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV; .zip at its end zips it.")],
    columns: Annotated[
        str,
        typer.Option(
            metavar="NAME=SOURCE,...",
            help="As of `ensemble batch`; of votes: id, text, answer, system, scores.0, text|number, ...",
        ),
    ],
    sample_submission: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV whose columns, ids, order and count it must have."),
    ] = None,
    fallback: Annotated[str, typer.Option(metavar="TEXT", help="What stands where there is no answer.")] = "",
) -> None:
    """Write a submission from results, without running anything.

    Exit codes: 0 every row has an answer, 1 failed, 2 called wrongly, 3 some rows took the fallback.
    """
    from ensemble_server.server.batch.results.columns import Column, parse_columns
    from ensemble_server.server.batch.results.outputs import OutputForm, write_lines
    from ensemble_server.server.batch.results.submission import SampleSubmission

    chosen = parse_columns(columns)
    if sample_submission is not None:
        sample = SampleSubmission.read(sample_submission)
        sample.check_columns(chosen)
        key = Column("id", chosen[0].source)
        sample.check_ids(lambda: (_id(key.value(line, 0)) for line in _lines(results)))
    _check_each_once(results, chosen)
    form = OutputForm("csv", chosen, fallback, is_zipped=output.suffix == ".zip")
    report = write_lines(_lines(results), output, form)
    typer.echo(f"{report.num_rows} rows; wrote {output}", err=True)
    for column in report.absent:
        typer.echo(f"warning: column {column.name!r}: no row has {column.source!r}", err=True)
    if report.num_filled:
        filled = f"took the fallback {fallback!r}" if fallback else "are blank"
        typer.echo(f"warning: {report.num_filled} rows have no answer and {filled}", err=True)
        raise typer.Exit(SOME_ROWS_FAILED)


def _check_each_once(results: Path, columns: Sequence[Column]) -> None:
    """Raise `ConfigError` if an id has several rows that the columns do not tell apart: cells of a grid, or several
    jobs in one file."""
    from ensemble_server.ensembles.errors import ConfigError
    from ensemble_server.server.batch.results.columns import CELL_NAMES, ID_SOURCES

    told_apart = [column for column in columns if column.source in (*ID_SOURCES, *CELL_NAMES)]
    if not any(column.source in ID_SOURCES for column in told_apart):
        return
    first_lines: dict[str, int] = {}
    for number, line in enumerate(_lines(results), start=1):
        found = next(_id(column.value(line, 0)) for column in told_apart if column.source in ID_SOURCES)
        key = repr([column.value(line, 0) for column in told_apart])
        if found is not None and (first := first_lines.setdefault(key, number)) != number:
            raise ConfigError(
                f"{results}: the id {found!r} stands in rows {first} and {number}, a submission has each once. If "
                f"these are answers of a grid, `ensemble vote {results} -o votes.jsonl` makes one of them; then run "
                "this on votes.jsonl"
            )


def _lines(results: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a file of results. Raises `ConfigError` at one that is none."""
    from ensemble_server.ensembles.errors import ConfigError
    from ensemble_server.server.batch.source.records import Record, read_records

    for record in read_records(results, "jsonl"):
        if not isinstance(record, Record):
            raise ConfigError(f"{results}, line {record.line}: {record.error}")
        yield record.values


def _id(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) else None
