"""The lines of OpenAI's batch output, and a file of them that is there as a whole or not at all.

https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson

from ensemble_server.server.batch.job.rows import BadRow
from ensemble_server.server.batch.job.store import JobStore, StoredRow
from ensemble_server.server.disk.whole_file import whole_file

NOT_RUN = {
    "message": "the run ended before this row was answered; run the same command again to go on",
    "type": "timeout_error",
    "param": None,
    "code": "batch_expired",
}


def output_line(stored: StoredRow) -> bytes:
    """{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} as JSON, with the line's end.

    Rows that failed have both a `response` and an `error`; rows that never ran (bad, or still pending) have no
    `response`, and an `error` whose code says which: that of the bad row, or "batch_expired". `id` follows from the
    row's place and `custom_id`.
    """
    row, result = stored.row, stored.result
    line: dict[str, Any] = {
        "id": line_id(row.index, row.custom_id),
        "custom_id": row.custom_id,
        "response": None,
        "error": None,
    }
    if isinstance(row, BadRow):
        line["error"] = {**row.error, "line": row.line}
    elif result is None:
        line["error"] = NOT_RUN
    else:
        line["response"] = {
            "status_code": result.status_code,
            "request_id": result.request_id,
            "body": result.body,
        }
        if not result.is_ok:
            line["error"] = result.body["error"]
    return orjson.dumps(line) + b"\n"


def line_id(index: int, custom_id: str | None) -> str:
    digest = hashlib.blake2b(repr((index, custom_id)).encode(), digest_size=16)
    return f"batch_req_{digest.hexdigest()}"


def write_output(store: JobStore, path: Path) -> None:
    """All rows of the job in their order, as a file at `path` that appears as a whole. Raises `StorageError`."""
    with whole_file(path) as file:
        for stored in store.rows():
            file.write(output_line(stored))
