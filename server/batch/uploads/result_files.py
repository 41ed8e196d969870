"""The two files that a batch ends with: lines of rows that were answered, and lines of those that were not.

Every row of the input has its line in one of them, in the input's order. A file without lines is not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import orjson

from ensemble_server.server.batch.job.rows import BadRow
from ensemble_server.server.batch.job.store import JobStore, StoredRow
from ensemble_server.server.batch.results.output_line import output_line
from ensemble_server.server.batch.uploads.catalogue import Batch, Status, StoredFile
from ensemble_server.server.batch.uploads.folder import BatchFolder, NewFile

BUFFER_BYTES = 1024**2
NOT_ANSWERED: Mapping[Status, str] = {
    "cancelled": "the batch was cancelled before this row was answered",
    "expired": "the batch's completion_window was over before this row was answered",
    "failed": "the batch failed before this row was answered",
}


@dataclass(frozen=True)
class ResultFiles:
    """Written files that are not in the catalogue yet, and what is in them. Tokens: of the rows that were answered."""

    output: StoredFile | None
    errors: StoredFile | None
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int

    @property
    def files(self) -> list[StoredFile]:
        return [file for file in (self.output, self.errors) if file is not None]


def write_result_files(job: JobStore, folder: BatchFolder, batch: Batch, end: Status) -> ResultFiles:
    """Write what became of every row, now that the batch comes to this end.

    Raises `StorageError`, and then leaves nothing behind.
    """
    with ExitStack() as undo:
        output, errors = _Lines(folder, undo), _Lines(folder, undo)
        input_tokens = output_tokens = 0
        for row in job.rows():
            if row.result is not None and row.result.is_ok:
                output.add(output_line(row))
                usage = row.result.body.get("usage") or {}
                input_tokens += usage.get("prompt_tokens", 0)
                output_tokens += usage.get("completion_tokens", 0)
            else:
                errors.add(_error_line(row, end))
        written = ResultFiles(
            output.finished(batch, "output"),
            errors.finished(batch, "error"),
            output.num_lines,
            errors.num_lines,
            input_tokens,
            output_tokens,
        )
        undo.pop_all()
        return written


def _error_line(row: StoredRow, end: Status) -> bytes:
    line = output_line(row)
    if row.result is not None or isinstance(row.row, BadRow):
        return line
    reason = {"message": NOT_ANSWERED[end], "type": "invalid_request_error", "param": None, "code": f"batch_{end}"}
    return orjson.dumps(orjson.loads(line) | {"error": reason}) + b"\n"


class _Lines:
    """A file that begins with its first line. `undo` deletes it."""

    def __init__(self, folder: BatchFolder, undo: ExitStack) -> None:
        self.num_lines = 0
        self._folder = folder
        self._undo = undo
        self._file: NewFile | None = None
        self._buffer = bytearray()

    def add(self, line: bytes) -> None:
        if self._file is None:
            self._file = self._folder.new_file()
            self._undo.callback(self._file.discard)
        self.num_lines += 1
        self._buffer += line
        if len(self._buffer) >= BUFFER_BYTES:
            self._file.write(bytes(self._buffer))
            self._buffer.clear()

    def finished(self, batch: Batch, kind: Literal["output", "error"]) -> StoredFile | None:
        if self._file is None:
            return None
        self._file.write(bytes(self._buffer))
        return self._file.finished(
            owner=batch.owner,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            expires_after_s=batch.output_expires_after_s,
        )
