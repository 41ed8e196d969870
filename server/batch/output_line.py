"""The lines of OpenAI's batch output, and a file of them that is there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from server.batch.store import JobStore, StoredRow


def output_line(stored: StoredRow) -> bytes:
    """{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} as JSON, with the line's end.

    Rows that failed have both a `response` and an `error`; rows that never ran (bad, or still pending) have no
    `response`, and an `error` whose code says which: that of the bad row, or "batch_expired".
    """
    raise NotImplementedError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; nothing happens to `path` otherwise.

    Raises `ConfigError` if it cannot be written.
    """
    raise NotImplementedError
    yield


def write_output(store: JobStore, path: Path) -> None:
    """All rows of the job in their order, as a file at `path` that appears as a whole. Raises `ConfigError`."""
    raise NotImplementedError
