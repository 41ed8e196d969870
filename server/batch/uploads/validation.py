"""Is an uploaded file a batch? Every line is checked before the first runs, and all that is wrong is said at once.

Only what makes a line a request is checked: its id, method, address and that it has a body. What the body asks for is
checked when the row is answered, and an error there is that row's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.batch.job.rows import Row, Url
from ensemble_server.server.batch.source.records import BadRecord, Record, jsonl_records
from ensemble_server.server.batch.uploads.catalogue import LineError
from ensemble_server.server.requests.errors import shortened, shown

MAX_ERRORS = 100
MAX_ID_CHARS = 512


@dataclass(frozen=True)
class Findings:
    """`errors` is empty if the file is a batch. `model`: what all rows name; None if they differ or name none."""

    num_rows: int
    errors: tuple[LineError, ...]
    model: str | None


def checked_file(path: Path, endpoint: Url, *, max_rows: int) -> Findings:
    """Read the whole file, a line at a time. Raises `OSError`."""
    errors: list[LineError] = []
    ids: dict[str, int] = {}
    models: set[str | None] = set()
    num_rows = 0
    with path.open("rb") as lines:
        for num_rows, record in enumerate(jsonl_records(lines), start=1):
            if num_rows > max_rows:
                limit = f"a batch may have {max_rows} rows (batch.max_rows), this file has more"
                errors.append(LineError("too_many_rows", limit, line=record.line))
                break
            found = checked_line(record, endpoint)
            if isinstance(found, Row) and (first := ids.setdefault(found.custom_id, record.line)) != record.line:
                message = f"custom_id {shown(found.custom_id)} stands in line {first} already; ids must differ"
                found = LineError("duplicate_custom_id", message, "custom_id", record.line)
            if isinstance(found, Row):
                model = found.body.get("model")
                models.add(model if isinstance(model, str) else None)
                continue
            errors.append(found)
            if len(errors) == MAX_ERRORS:
                errors.append(LineError("too_many_errors", f"lines after {record.line} have not been checked"))
                break
    if not num_rows:
        errors.append(LineError("empty_file", "the input file has no lines"))
    return Findings(num_rows, tuple(errors), models.pop() if len(models) == 1 else None)


def rows_of(path: Path, endpoint: Url) -> Iterator[Row]:
    """The rows of a file without errors."""
    with path.open("rb") as lines:
        for index, record in enumerate(jsonl_records(lines)):
            row = checked_line(record, endpoint, index)
            assert isinstance(row, Row), "the file has been checked, and files do not change"
            yield row


def checked_line(record: Record | BadRecord, endpoint: Url, index: int = 0) -> Row | LineError:
    """One line as the row number `index`, or what is wrong with it."""
    if isinstance(record, BadRecord):
        return LineError("invalid_json_line", f"the line {record.error}", line=record.line)
    values = record.values
    try:
        for name in ("custom_id", "method", "url", "body"):
            if values.get(name) is None:
                raise RequestError(f"the line has no {name}", param=name)
        if not isinstance(values["custom_id"], str) or not 0 < len(values["custom_id"]) <= MAX_ID_CHARS:
            got = shown(values["custom_id"])
            raise RequestError(
                f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters, got {got}", param="custom_id"
            )
        if values["method"] != "POST":
            raise RequestError(f"method must be POST, got {shown(values['method'])}", param="method")
        if values["url"] != endpoint:
            raise RequestError(f"url must be the batch's endpoint, {endpoint}, got {shown(values['url'])}", param="url")
        if not isinstance(values["body"], dict):
            raise RequestError(f"body must be an object, got {shown(values['body'])}", param="body")
    except RequestError as exc:
        assert exc.param is not None, "each of these names one"
        code = "missing_required_parameter" if values.get(exc.param) is None else f"invalid_{exc.param}"
        return LineError(code, shortened(str(exc), 300), exc.param, record.line)
    return Row(index, values["custom_id"], endpoint, values["body"])
