"""What people keep their prompts in: JSONL, a JSON array, CSV and TSV, Parquet, a folder of texts. Record by record.

A line that is no record becomes a `BadRecord` in its place, whatever is wrong with it (not JSON, not UTF-8, torn off);
a source that cannot be read at all raises `ConfigError` or `OSError`. Blank lines of JSONL and CSV are no records.
Text may be compressed, or in UTF-16 (`server.batch.source.text_files`). Left out: tables without a header.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from pydantic_core import from_json

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.surrogates import with_mended_escapes
from ensemble_server.server.batch.source.text_files import UTF8, as_text, lines_of, opened, text_of

SourceKind = Literal["jsonl", "csv", "tsv", "parquet", "folder"]

SUFFIXES: Mapping[str, SourceKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
MAX_FIELD_CHARS = 2**31 - 1
PARQUET_ROWS_AT_ONCE = 256
_NOT_BLANK = re.compile(r"[^ \t\n\r]")


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
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    if suffixes and suffixes[-1] in SUFFIXES:
        return SUFFIXES[suffixes[-1]]
    raise ConfigError(
        f"{path}: what it holds cannot be told from its name; say --input-format {'|'.join(get_args(SourceKind))}"
    )


def read_records(path: Path, kind: SourceKind) -> Iterator[Record | BadRecord]:
    """The records of a source, in its order (files of a folder: in order of their names)."""
    match kind:
        case "jsonl":
            with opened(path) as (file, encoding):
                yield from _json_records(lines_of(file, encoding), path)
        case "csv" | "tsv":
            with opened(path) as (file, encoding):
                delimiter = "," if kind == "csv" else "\t"
                with as_text(file, encoding, newline="") as lines:
                    yield from csv_records(lines, delimiter=delimiter, name=str(path))
        case "parquet":
            yield from _parquet_records(path)
        case "folder":
            yield from _folder_records(path)


# --- JSON ---------------------------------------------------------------------------------------------------------


def jsonl_records(lines: Iterable[bytes]) -> Iterator[Record | BadRecord]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = _unmarked(line)
        if not line.strip():
            continue
        try:
            value = from_json(line.strip(), allow_inf_nan=False, cache_strings="none")
        except ValueError as exc:
            torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
            yield BadRecord(number, f"is not JSON: {exc}{torn}")
            continue
        yield _record(number, value)


def starts_a_document(line: bytes) -> bool:
    """Whether JSON that begins with this line, the first that is not blank, goes on beyond it or is an array: the
    file of an editor or of `json.dump`, and not one record a line."""
    return line.strip() == b"{" or line.lstrip().startswith(b"[")


def _json_records(lines: Iterator[bytes], path: Path) -> Iterator[Record | BadRecord]:
    """Records a line, or those of a JSON array, or of objects over several lines each."""
    passed: list[bytes] = []
    for line in lines:
        passed.append(line if passed else _unmarked(line))
        if passed[-1].strip():
            break
    if not passed or not starts_a_document(passed[-1]):
        yield from jsonl_records(itertools.chain(passed, lines))
        return
    yield from _document_records(b"".join(itertools.chain(passed, lines)), path)


def _document_records(content: bytes, path: Path) -> Iterator[Record | BadRecord]:
    """The values of JSON that is no JSONL; of arrays, their items. It is held in memory as a whole.

    Raises `ConfigError` where it breaks off: what came before is all right, what comes after cannot be told apart.
    """
    text = content.decode(UTF8)
    line, counted = 1, 0
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    place, depth, wants_comma = _after_blanks(text, 0), 0, False
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        try:
            if depth == 0 and text[place] == "[":
                place, depth, wants_comma = place + 1, 1, False
            elif depth and text[place] == "]":
                place, depth = place + 1, 0
            elif wants_comma:
                if text[place] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
                place, wants_comma = place + 1, False
            else:
                start = place
                value, place = decoder.raw_decode(text, place)
                wants_comma = bool(depth)
                yield _record(line, value) if _is_whole(text[start:place]) else BadRecord(line, _HALF)
        except (ValueError, RecursionError) as exc:
            at = line + text.count("\n", counted, exc.pos) if isinstance(exc, json.JSONDecodeError) else line
            reason = exc.msg if isinstance(exc, json.JSONDecodeError) else str(exc)
            raise ConfigError(
                f"{path}, line {at}: the file is neither a JSON array nor one JSON object a line ({reason})"
            ) from exc
        place = _after_blanks(text, place)
    if depth:
        raise ConfigError(f"{path}: the JSON array that it holds is not closed; the file was cut off")


_HALF = "holds half of a UTF-16 pair (an escape such as \\ud83d without the other one)"


def _is_whole(source: str) -> bool:
    return with_mended_escapes(source) == source


def _record(line: int, value: Any) -> Record | BadRecord:
    if isinstance(value, dict):
        return Record(line, value)
    return BadRecord(line, f"must be a JSON object, got {type(value).__name__}")


def _unmarked(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf")


def _after_blanks(text: str, place: int) -> int:
    found = _NOT_BLANK.search(text, place)
    return len(text) if found is None else found.start()


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# --- tables -------------------------------------------------------------------------------------------------------


_OTHER_DELIMITER = re.compile(r"(?:sep=.|[\w.-]+ ?([;\t|,]) ?[\w.-]+(?: ?\1 ?[\w.-]+)*)")


def csv_records(lines: Iterable[str], *, delimiter: str, name: str) -> Iterator[Record | BadRecord]:
    """Records of a table whose first row names its columns; all values are texts."""
    csv.field_size_limit(min(MAX_FIELD_CHARS, sys.maxsize))  # its default stops at 131,072 characters, a long prompt
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as exc:
        raise ConfigError(f"{name}: its first row cannot be read: {exc}{_swallowed(1, reader.line_num)}") from exc
    if not header:
        raise ConfigError(f"{name}: must begin with a row that names the columns")
    if len(header) == 1 and (other := _OTHER_DELIMITER.fullmatch(header[0])) is not None:
        wanted = "tabs" if delimiter == "\t" else "commas"
        raise ConfigError(
            f"{name}: its first row is one column, {header[0][:80]!r}; columns are separated by {wanted} here, not by "
            f"{other[1] or header[0][-1]!r}: save the table so, or say --input-format"
        )
    if len(set(header)) < len(header) or not all(map(_is_utf8, header)):
        raise ConfigError(f"{name}: the columns must have different names in UTF-8, got {', '.join(map(repr, header))}")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as exc:
            yield BadRecord(line, f"is not CSV: {exc}{_swallowed(line, reader.line_num)}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        values = {column: text for column, text in zip(header, fields, strict=False) if _is_utf8(text)}
        if len(fields) != len(header):
            error = f"has {len(fields)} fields, the header has {len(header)}{_swallowed(line, reader.line_num)}"
            yield BadRecord(line, error, values)
        elif bad := [column for column in header if column not in values]:
            yield BadRecord(line, f"column {bad[0]!r} is not UTF-8", values)
        else:
            yield Record(line, values)


def _swallowed(first: int, last: int) -> str:
    """What a row that cannot be read has taken with it, if it goes beyond its first line."""
    if last <= first:
        return ""
    return f"; a quote that opens in line {first} makes lines {first} to {last} one row. Close it, or double it"


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


# --- folders ------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    """The files that are records, in their order."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def skipped_in(folder: Path) -> list[str]:
    """The names of what is no record of a folder: hidden files, folders within, and what is no file."""
    records = {path.name for path in files_of(folder)}
    return sorted(path.name for path in folder.iterdir() if path.name not in records)


def _folder_records(folder: Path) -> Iterator[Record | BadRecord]:
    """A record for each file: `id` (its name without the ending), `name` and `text`. See `skipped_in`."""
    for number, path in enumerate(files_of(folder), start=1):
        values = {"id": path.stem, "name": path.name}
        try:
            with opened(path) as (file, _):
                content = file.read()
            text = text_of(content)
        except UnicodeDecodeError as exc:
            yield BadRecord(number, f"{path.name}: must be UTF-8 text, byte {exc.start} is not", values)
        except OSError as exc:
            yield BadRecord(number, f"{path.name}: cannot be read ({exc.strerror or exc})", values)
        except ConfigError as exc:
            yield BadRecord(number, str(exc).replace(str(path), path.name), values)
        else:
            yield Record(number, {**values, "text": text})
