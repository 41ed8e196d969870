"""What a vote is held on, row by row, and how lines of files are read so that whatever is wrong has a file and a line.

A row that cannot be used becomes a `BadRow` that says why, in its place. A file that cannot be used as a whole raises
`RequestError` or `OSError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.errors import RequestError

RowId = str | int | float | None

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_FORMS = {  # the longer first: UTF-32's mark begins with UTF-16's
    b"\xff\xfe\0\0": "is UTF-32; save it as UTF-8",
    b"\0\0\xfe\xff": "is UTF-32; save it as UTF-8",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"\x1f\x8b": "is compressed; unpack it first",
    b"PK\x03\x04": "is a zip file or a workbook; save it as JSON lines or CSV",
}


@dataclass(frozen=True)
class CandidateRow:
    """One vote to hold. `weights`, `systems`, `logprobs` (None where the file has none): one for each candidate.

    `line`: where it stands, from 1. `matrices`: (n, n) scores to replay, by name of similarity; only with these may
    `texts` be missing. `logprobs`: nats per token. `prompt`: a text or chat messages, as the file has it.
    """

    id: RowId
    line: int
    texts: tuple[str, ...] | None
    weights: tuple[float, ...]
    systems: tuple[str | None, ...]
    matrices: Mapping[str, np.ndarray] = field(default_factory=dict)
    logprobs: tuple[float | None, ...] = ()
    prompt: str | Sequence[Message] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be voted on. `line` counts from 1."""

    id: RowId
    line: int
    error: str


Row = CandidateRow | BadRow


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank; the value of one that is not JSON is a `BadRow`.

    A byte order mark is no part of a line. Raises `RequestError` for a file, called `name`, that holds no lines of
    JSON.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            _check_form(line, name)
            if line.lstrip(_BYTE_ORDER_MARK + b" \t").startswith((b"[\n", b"[\r", b"[{")) or line.strip() == b"[":
                raise RequestError(f"{name}: is one JSON array; write one object per line (JSON lines)")
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            yield number, from_json(line.decode("utf-8"), allow_inf_nan=False)
        except UnicodeDecodeError as exc:
            yield number, BadRow(None, number, f"is not UTF-8: byte 0x{line[exc.start]:02x} at place {exc.start + 1}")
        except ValueError as exc:
            yield number, BadRow(None, number, f"is not JSON: {exc}")


def read_text(path: Path) -> str:
    """A whole file of UTF-8, without its byte order mark. Raises `RequestError` naming the line of a bad byte."""
    data = path.read_bytes()
    _check_form(data[:4], str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise RequestError(
            f"{path}, line {line}: is not UTF-8 (byte 0x{data[exc.start]:02x}); save the file as UTF-8"
        ) from exc


def _check_form(beginning: bytes, name: str) -> None:
    for mark, what in _OTHER_FORMS.items():
        if beginning.startswith(mark):
            raise RequestError(f"{name}: {what}")


def id_in(value: Any) -> RowId:
    """The id of a line that is not what it should be, so that its report can be matched all the same."""
    found = value.get("id", value.get("custom_id")) if isinstance(value, dict) else None
    return found if isinstance(found, str | int | float) else None


def first_finding(error: ValidationError) -> str:
    finding = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(map(str, finding["loc"]))
    return f"{path}: {finding['msg']}" if path else finding["msg"]
