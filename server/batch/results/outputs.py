"""What a job leaves behind: OpenAI's batch output, or a table of chosen columns; as a whole file or not at all.

"-" is standard output.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.job.store import JobStore, StoredRow
from ensemble_server.server.batch.results.columns import CELL_NAMES, Column
from ensemble_server.server.batch.results.output_line import output_line
from ensemble_server.server.batch.results.submission import TableReport, write_table
from ensemble_server.server.batch.source.grid import Grid
from ensemble_server.server.disk.whole_file import whole_file

OutputFormat = Literal["jsonl", "csv"]
STDOUT = Path("-")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the oldest that a ZIP can say: equal answers make equal files


@dataclass(frozen=True)
class OutputForm:
    """How results are written; it can change from run to run without running anything again."""

    format: OutputFormat = "jsonl"
    columns: Sequence[Column] = ()
    fallback: str = ""
    is_zipped: bool = False  # a file's; standard output is never zipped


def write_job(store: JobStore, grid: Grid, path: Path, form: OutputForm) -> TableReport | None:
    """Write all rows of a job in their order; rows that have no answer yet say so. Raises `ConfigError`.

    Each line of a job with a grid has a `cell` besides OpenAI's keys. Returns what a table had to fill in.
    """
    if form.format == "jsonl":
        with _sink(path, form) as file:
            for stored in store.rows():
                file.write(_line_in_cell(stored, grid))
        return None
    return write_lines((_shown_line(stored) for stored in store.rows()), path, form)


def write_lines(lines: Iterable[Mapping[str, Any]], path: Path, form: OutputForm) -> TableReport:
    """Write lines of results as a table."""
    with _sink(path, form) as file:
        return write_table(lines, form.columns, file, fallback=form.fallback)


def _line_in_cell(stored: StoredRow, grid: Grid) -> bytes:
    line = output_line(stored)
    if not grid.axes:
        return line
    return orjson.dumps(orjson.loads(line) | {"cell": grid.cell_of(stored.row.index)}) + b"\n"


def _shown_line(stored: StoredRow) -> dict[str, Any]:
    """A line for a table: with what the row asked for, whether that was an axis of the grid or not."""
    body = stored.row.body if isinstance(stored.row, Row) else {}
    return orjson.loads(output_line(stored)) | {"cell": {name: body[name] for name in CELL_NAMES if name in body}}


@contextmanager
def _sink(path: Path, form: OutputForm) -> Iterator[IO[bytes]]:
    if path == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with whole_file(path) as whole:
        if not form.is_zipped:
            yield whole
            return
        with zipfile.ZipFile(whole, "w") as archive:
            entry = zipfile.ZipInfo(entry_name(path, form.format), _ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as inside:
                yield inside


def entry_name(path: Path, output_format: OutputFormat) -> str:
    """The name of the one file in a ZIP: "submission.csv.zip" -> "submission.csv", "s.zip" -> "s.csv" """
    stem = path.name.removesuffix(".zip")
    return stem if Path(stem).suffix else f"{stem}.{output_format}"
