"""A table of answers as competitions take it: CSV, held against the sample submission, and never empty.

A row without an answer keeps its place: its answer columns take the fallback, or stay blank.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Self

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.results.columns import ABSENT, Column, cell_text, num_samples
from ensemble_server.server.batch.source.records import Record, read_records

NUM_SHOWN = 3  # ids that an error names of each kind
_END: Any = object()


@dataclass(frozen=True)
class TableReport:
    """`num_filled`: rows with an answer column that had to be filled. `absent`: columns that no row had a value for."""

    num_rows: int
    num_filled: int
    absent: tuple[Column, ...]


def write_table(
    lines: Iterable[Mapping[str, Any]], columns: Sequence[Column], file: IO[bytes], *, fallback: str = ""
) -> TableReport:
    """A CSV row for each line; for each of its choices if one of the columns is `sample`."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    has_samples = any(column.source == "sample" for column in columns)
    num_rows = num_filled = 0
    never_seen = set(columns)
    for line in lines:
        for sample in range(num_samples(line) if has_samples else 1):
            values = [column.value(line, sample) for column in columns]
            never_seen -= {column for column, value in zip(columns, values, strict=True) if value is not ABSENT}
            cells = list(map(cell_text, values))
            blank = [place for place, column in enumerate(columns) if column.is_answer and not cells[place].strip()]
            for place in blank:
                cells[place] = fallback
            writer.writerow(cells)
            num_rows += 1
            num_filled += bool(blank)
    text.flush()
    text.detach()  # subtle: else its end would close `file`, which is not ours
    return TableReport(num_rows, num_filled, tuple(column for column in columns if column in never_seen))


@dataclass(frozen=True)
class SampleSubmission:
    """The file that shows what a submission looks like: its columns, of which the first is the id, and its ids."""

    path: Path
    header: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `ConfigError` if it is no table, or has no row, or an id twice."""
        rows = iter(read_records(path, _kind(path)))
        first = next(rows, None)
        if not isinstance(first, Record):
            raise ConfigError(f"{path}: {'has no rows' if first is None else first.error}")
        sample = cls(path, tuple(first.values))
        seen: set[str] = set()
        for custom_id in sample.ids():
            if custom_id in seen:
                raise ConfigError(f"{path}: the id {custom_id!r} stands there twice")
            seen.add(custom_id)
        return sample

    def ids(self) -> Iterator[str]:
        """The first column. Raises `ConfigError` at a row that cannot be read."""
        for record in read_records(self.path, _kind(self.path)):
            if not isinstance(record, Record):
                raise ConfigError(f"{self.path}, line {record.line}: {record.error}")
            yield record.values[self.header[0]]

    def columns(self) -> tuple[Column, ...]:
        """What a table of this shape shows if nobody said: id and content. Raises `ConfigError` if it has more."""
        if len(self.header) != 2:
            raise ConfigError(
                f"{self.path} has the columns {', '.join(self.header)}; say with --columns what goes into each"
            )
        return Column(self.header[0], "custom_id"), Column(self.header[1], "content")

    def check_columns(self, columns: Sequence[Column]) -> None:
        """Raise `ConfigError` unless these are its columns, in its order, the id first and a row for each id."""
        names = tuple(column.name for column in columns)
        if names != self.header:
            raise ConfigError(
                f"--columns: {self.path} has the columns {', '.join(self.header)} in this order, got {', '.join(names)}"
            )
        if columns[0].source not in ("custom_id", "id"):
            raise ConfigError(f"--columns: the first column of {self.path} is the id; write {names[0]}=custom_id")
        if any(column.source == "sample" for column in columns):
            raise ConfigError("--columns: with `sample` an id has several rows, a submission has one")

    def check_ids(self, ids: Callable[[], Iterable[str | None]]) -> None:
        """Raise `ConfigError` unless `ids()` gives its ids in its order; says what is missing, unknown or misplaced."""
        places = zip_longest(self.ids(), ids(), fillvalue=_END)
        wrong = next(((place, *pair) for place, pair in enumerate(places, start=1) if pair[0] != pair[1]), None)
        if wrong is None:
            return
        wanted, given = list(self.ids()), list(ids())
        findings = [f"row {wrong[0]} is {_shown(wrong[1])} there and {_shown(wrong[2])} here"]
        if len(wanted) != len(given):
            findings.insert(0, f"it has {len(wanted)} rows, this job {len(given)}")
        missing, unknown = set(wanted) - set(given), set(given) - set(wanted)
        for what, found in (("missing here", missing), ("not in it", unknown)):
            if found:
                shown = sorted(map(_shown, found))
                more = f" and {len(shown) - NUM_SHOWN} more" if len(shown) > NUM_SHOWN else ""
                findings.append(f"{what}: {', '.join(shown[:NUM_SHOWN])}{more}")
        if not missing and not unknown and len(wanted) == len(given):
            findings.append("the ids are the same in another order; sort the input as it is sorted")
        raise ConfigError(f"the rows do not match {self.path}: {'; '.join(findings)}")


def _kind(path: Path) -> Any:
    return "tsv" if path.suffix.lower() == ".tsv" else "csv"


def _shown(custom_id: str | None) -> str:
    if custom_id is None:
        return "a row without an id"
    return "the end" if custom_id is _END else repr(custom_id)
