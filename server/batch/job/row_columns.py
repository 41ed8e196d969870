"""Between rows and results and the columns that keep them, in both directions."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson
from pydantic_core import from_json

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.server.batch.job.identity import encoded_body, shared_digest
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult

if TYPE_CHECKING:
    from ensemble_server.server.requests.errors import ErrorObject


def row_columns(row: Row | BadRow) -> tuple[Any, ...]:
    """(place, custom_id, url, body, line, model, digest). A body that is no JSON makes a bad row."""
    if isinstance(row, Row):
        try:
            body = encoded_body(row.body)
        except ValueError as exc:
            row = BadRow(row.index, row.custom_id, row.index + 1, _not_json(exc))
        else:
            model = row.body.get("model")
            model = model if isinstance(model, str) else None
            return (row.index, row.custom_id, row.url, body, None, model, shared_digest(row))
    return (row.index, row.custom_id, None, encoded_body(row.error), row.line, None, None)


def _not_json(exc: ValueError) -> ErrorObject:
    message = f"the body is not JSON: {exc}"
    return {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_value"}


def row_of(place: int, custom_id: str | None, url: Any, body: bytes, line: int | None) -> Row | BadRow:
    if url is None:
        assert line is not None, "a bad row is kept with its line"
        return BadRow(place, custom_id, line, from_json(body))
    assert custom_id is not None, "a row that can run is kept with its id"
    return Row(place, custom_id, url, from_json(body))


def result_of(status_code: int, request_id: str, body: bytes, usage: str, is_cut: int) -> RowResult:
    used = {member: MemberUsage(**numbers) for member, numbers in json.loads(usage).items()}
    return RowResult(status_code, request_id, orjson.loads(body), used, bool(is_cut))


def result_columns(result: RowResult) -> tuple[Any, ...]:
    """(status_code, request_id, body, usage, is_cut)"""
    usage = {member: asdict(used) for member, used in result.usage.items()}
    body = orjson.dumps(result.body, option=orjson.OPT_SERIALIZE_NUMPY)
    return result.status_code, result.request_id, body, json.dumps(usage), result.is_cut


def difference(before: Row | BadRow, now: Row | BadRow) -> str:
    """What tells two rows in the same place apart, in a sentence."""
    at = f"row {before.index + 1}"
    if before.custom_id != now.custom_id:
        return f"{at} was {before.custom_id!r}, is now {now.custom_id!r}"
    at += f" ({before.custom_id!r})"
    if isinstance(before, BadRow) or isinstance(now, BadRow):
        return f"{at} is not what it was"
    if before.url != now.url:
        return f"{at} was sent to {before.url}, is now sent to {now.url}"
    changed = [key for key in {**before.body, **now.body} if before.body.get(key) != now.body.get(key)]
    return f"{at} has another {' and '.join(changed)}" if changed else f"{at} has its keys in another order"
