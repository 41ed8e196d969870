"""The lines of OpenAI's batch output, and a file of them that is there as a whole or not at all.

https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.batch.job.rows import BadRow
from ensemble_server.server.batch.job.store import JobStore, StoredRow

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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; nothing happens to `path` otherwise.

    Raises `StorageError` if it cannot be written. What the block raises for other reasons passes through.
    """
    path = path.resolve()  # what a link points to is replaced, and the link stays
    try:
        if path.exists() and not path.is_file():  # a pipe or a device takes what comes; a folder is an error
            with path.open("wb") as file:
                yield file
            return
        beside = path.with_name(f".{path.name}.part")
        try:
            with beside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as exc:
        raise StorageError(
            f"{path} cannot be written ({exc.strerror or exc}); what was there before is unchanged. Free some space, or"
            " choose another place"
        ) from exc


def _sync_folder(folder: Path) -> None:
    """Put the new name on disk too; not every file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
