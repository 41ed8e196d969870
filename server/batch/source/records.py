"""What people keep their prompts in: JSONL, CSV and TSV, Parquet, a folder of texts. One record at a time.

A line that is no record becomes a `BadRecord` in its place, whatever is wrong with it (not JSON, not UTF-8, torn off);
a source that cannot be read at all raises `ConfigError` or `OSError`. Blank lines of JSONL and CSV are no records.
Left out: compressed files, tables without a header.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic_core import from_json

from ensemble_server.ensembles.errors import ConfigError

SourceKind = Literal["jsonl", "csv", "tsv", "parquet", "folder"]

SUFFIXES: Mapping[str, SourceKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
MAX_FIELD_CHARS = 2**31 - 1
PARQUET_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Record:
    """`line`: its place in the source, from 1: a line of text, a row of a Parquet file, a file of a folder."""

    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """`values`: what could be read of it all the same, so that its id is not lost."""

    line: int
    error: str
    values: Mapping[str, Any] = field(default_factory=dict)


def kind_of_source(path: Path, kind: SourceKind | None = None) -> SourceKind:
    """`kind` where it is given, else what the path's ending says. Raises `ConfigError` if that says nothing."""
    if kind is not None:
        return kind
    if path.is_dir():
        return "folder"
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    raise ConfigError(
        f"{path}: what it holds cannot be told from its name; say --input-format {'|'.join(get_args(SourceKind))}"
    )


def read_records(path: Path, kind: SourceKind) -> Iterator[Record | BadRecord]:
    """The records of a source, in its order (files of a folder: in order of their names)."""
    match kind:
        case "jsonl":
            with path.open("rb") as lines:
                yield from jsonl_records(lines)
        case "csv" | "tsv":
            # Bytes that are no UTF-8 arrive as lone surrogates, so that they cost their own row and not the file.
            with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
                yield from csv_records(lines, delimiter="," if kind == "csv" else "\t", name=str(path))
        case "parquet":
            yield from _parquet_records(path)
        case "folder":
            yield from _folder_records(path)


def jsonl_records(lines: Iterable[bytes]) -> Iterator[Record | BadRecord]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = from_json(line.strip(), allow_inf_nan=False, cache_strings="none")
        except ValueError as exc:
            torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
            yield BadRecord(number, f"is not JSON: {exc}{torn}")
            continue
        if isinstance(value, dict):
            yield Record(number, value)
        else:
            yield BadRecord(number, f"must be a JSON object, got {type(value).__name__}")


def csv_records(lines: Iterable[str], *, delimiter: str, name: str) -> Iterator[Record | BadRecord]:
    """Records of a table whose first row names its columns; all values are texts."""
    csv.field_size_limit(min(MAX_FIELD_CHARS, sys.maxsize))  # its default stops at 131,072 characters, a long prompt
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as exc:
        raise ConfigError(f"{name}: its first row cannot be read: {exc}") from exc
    if not header:
        raise ConfigError(f"{name}: must begin with a row that names the columns")
    if len(set(header)) < len(header) or not all(map(_is_utf8, header)):
        raise ConfigError(f"{name}: the columns must have different names in UTF-8, got {', '.join(map(repr, header))}")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as exc:
            yield BadRecord(line, f"is not CSV: {exc}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        values = {column: text for column, text in zip(header, fields, strict=False) if _is_utf8(text)}
        if len(fields) != len(header):
            yield BadRecord(line, f"has {len(fields)} fields, the header has {len(header)}", values)
        elif bad := [column for column in header if column not in values]:
            yield BadRecord(line, f"column {bad[0]!r} is not UTF-8", values)
        else:
            yield Record(line, values)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as exc:
        raise ConfigError("Parquet needs pyarrow: pip install 'ensemble-server[tables]'") from exc
    try:
        file = ParquetFile(path)
    except ArrowInvalid as exc:
        raise ConfigError(f"{path}: not a Parquet file: {exc}") from exc
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE):
            for values in batch.to_pylist():
                number += 1
                yield Record(number, {name: _as_json(value) for name, value in values.items()})


def _as_json(value: Any) -> Any:
    """Values that only tables have, as JSON has them: dates in ISO 8601, decimals as text, bytes as UTF-8."""
    match value:
        case datetime() | date():
            return value.isoformat()
        case Decimal():
            return str(value)
        case bytes():
            return value.decode("utf-8", errors="replace")
        case dict():
            return {name: _as_json(item) for name, item in value.items()}
        case list():
            return [_as_json(item) for item in value]
    return value


def _folder_records(folder: Path) -> Iterator[Record | BadRecord]:
    """A record for each file: `id` (its name without the ending), `name` and `text`. Hidden files are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for number, path in enumerate(files, start=1):
        values = {"id": path.stem, "name": path.name}
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as exc:
            yield BadRecord(number, f"{path.name}: must be UTF-8 text, byte {exc.start} is not", values)
        except OSError as exc:
            yield BadRecord(number, f"{path.name}: cannot be read ({exc.strerror or exc})", values)
        else:
            yield Record(number, {**values, "text": text})
