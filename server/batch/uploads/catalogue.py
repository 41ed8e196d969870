"""The table of what clients have uploaded and asked for: files and batches, each with its owner, in one SQLite file.

A row of it says that a file exists and whose it is; its bytes lie beside (`server.batch.uploads.folder`). An owner is
the digest of an API key and never the key ("" where the server has none). Ids begin with the time, so that their order
is the order in which things were made, and a list can go on after an id that is deleted meanwhile.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ensemble_server.ensembles.errors import StorageBusyError, StorageDamagedError, StorageError
from ensemble_server.server.batch.job.rows import Url
from ensemble_server.server.batch.sqlite_transaction import transaction

Purpose = Literal["batch", "batch_output"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Order = Literal["asc", "desc"]

LIVE: frozenset[Status] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
BUSY_S = 0.1  # nobody but a backup or an administrator holds it, and clients wait meanwhile
_VERSION = 1
_SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS files (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
        num_bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS batches (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, status TEXT NOT NULL, document TEXT NOT NULL
    ) STRICT;
    CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
    PRAGMA user_version = {_VERSION};
"""


@dataclass(frozen=True)
class StoredFile:
    """A file that is there as a whole. Times are seconds since 1970."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int
    expires_at: int


@dataclass(frozen=True)
class LineError:
    """Why a batch was refused. `line`: of its input file, from 1; None if no single line is at fault."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class Batch:
    """One batch. `reached`: when it came into each status, in seconds since 1970.

    `total`, `completed` and `failed` count rows. While the batch runs they are what was known at the last change of
    status; the job's own file knows better. `account`: the name of the key that it counts for.
    """

    id: str
    owner: str
    endpoint: Url
    input_file_id: str
    completion_window: str
    expires_at: int
    status: Status
    reached: Mapping[Status, int]
    metadata: Mapping[str, str] | None = None
    output_expires_after_s: int | None = None
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: tuple[LineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    account: str = ""
    seed: int = field(default_factory=lambda: secrets.randbits(31))  # of rows that bring none

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    def moved(self, status: Status, **changes: Any) -> Batch:
        """The batch in a new status, with `changes` of other fields."""
        return replace(self, status=status, reached={**self.reached, status: int(time.time())}, **changes)


def new_id(prefix: str) -> str:
    """ "file-" -> "file-187f3a5b9c2d4e60a1b2c3d4e5f60718": 16 digits of time, 16 of chance."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


class Catalogue:
    """An open catalogue. Methods may be called from any thread. Raises `StorageError` if the disk does not obey."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        with self._transaction() as db:
            [version] = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise StorageError("batch.folder was written by another version of this server; name another folder")
        with self._heeded():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- files ---

    def add_file(self, file: StoredFile) -> None:
        with self._transaction() as db:
            _insert_file(db, file)

    def file(self, file_id: str, owner: str) -> StoredFile | None:
        """None if there is none, it belongs to another owner, or its time is over."""
        rows = self._select("SELECT * FROM files WHERE id = ? AND owner = ? AND expires_at > ?", file_id, owner, _now())
        return StoredFile(*rows[0]) if rows else None

    def files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> list[StoredFile]:
        """The next `limit` files of an owner beyond the id `after`."""
        where, values = "owner = ? AND expires_at > ?", [owner, _now()]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        return [StoredFile(*row) for row in self._page("files", where, values, after, limit, order)]

    def num_bytes_uploaded(self, owner: str) -> int:
        """Of the owner's uploads that are there; what batches have written is not counted."""
        [(number,)] = self._select(
            "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE owner = ? AND purpose = 'batch' AND expires_at > ?",
            owner,
            _now(),
        )
        return number

    def remove_file(self, file_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", [file_id])

    def file_ids(self) -> set[str]:
        return {file_id for (file_id,) in self._select("SELECT id FROM files")}

    # --- batches ---

    def add_batch(self, batch: Batch, *, max_live: int) -> bool:
        """Whether it was added: not if its owner has `max_live` already that have not ended."""
        with self._transaction() as db:
            marks = ", ".join("?" * len(LIVE))
            [live] = db.execute(
                f"SELECT count(*) FROM batches WHERE owner = ? AND status IN ({marks})", [batch.owner, *LIVE]
            ).fetchone()
            if live < max_live:
                db.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", _batch_row(batch))
            return live < max_live

    def batch(self, batch_id: str, owner: str) -> Batch | None:
        """None if there is none, or if it belongs to another owner."""
        rows = self._select("SELECT document FROM batches WHERE id = ? AND owner = ?", batch_id, owner)
        return _batch(rows[0][0]) if rows else None

    def batches(self, owner: str, *, after: str | None, limit: int) -> list[Batch]:
        """The next `limit` batches of an owner beyond the id `after`, newest first."""
        rows = self._page("batches", "owner = ?", [owner], after, limit, "desc")
        return [_batch(document) for *_, document in rows]

    def live_batches(self) -> list[Batch]:
        """Those of all owners that have not ended, oldest first."""
        marks = ", ".join("?" * len(LIVE))
        rows = self._select(f"SELECT document FROM batches WHERE status IN ({marks}) ORDER BY id", *LIVE)
        return [_batch(document) for (document,) in rows]

    def change_batch(
        self, batch_id: str, change: Callable[[Batch], Batch], *, new_files: Sequence[StoredFile] = ()
    ) -> Batch:
        """Put `change(batch)` in the place of a batch, and add files, all or nothing. What `change` raises goes on."""
        with self._transaction() as db:
            [document] = db.execute("SELECT document FROM batches WHERE id = ?", [batch_id]).fetchone()
            batch = change(_batch(document))
            for file in new_files:
                _insert_file(db, file)
            db.execute("REPLACE INTO batches VALUES (?, ?, ?, ?)", _batch_row(batch))
            return batch

    def num_batches(self) -> dict[Status, int]:
        """How many batches are in each status, of all owners."""
        return dict(self._select("SELECT status, count(*) FROM batches GROUP BY status"))

    # --- retention ---

    def forget_expired(self, *, batches_before: int) -> list[str]:
        """Delete files whose time is over, and batches made before `batches_before` that have ended.

        Returns the ids of the files. Those of batches that are still being validated are kept.
        """
        with self._transaction() as db:
            needed = {
                _batch(document).input_file_id
                for (document,) in db.execute("SELECT document FROM batches WHERE status = 'validating'")
            }
            found = db.execute("SELECT id FROM files WHERE expires_at <= ?", [_now()]).fetchall()
            expired = [file_id for (file_id,) in found if file_id not in needed]
            db.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in expired])
            marks = ", ".join("?" * len(LIVE))
            oldest_kept = f"batch_{batches_before * 10**9:016x}"
            db.execute(f"DELETE FROM batches WHERE id < ? AND status NOT IN ({marks})", [oldest_kept, *LIVE])
            return expired

    # --- SQLite ---

    def _page(
        self, table: str, where: str, values: list[Any], after: str | None, limit: int, order: Order
    ) -> list[tuple[Any, ...]]:
        if after is not None:
            where, values = f"{where} AND id {'>' if order == 'asc' else '<'} ?", [*values, after]
        return self._select(f"SELECT * FROM {table} WHERE {where} ORDER BY id {order} LIMIT ?", *values, limit)

    def _select(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._heeded():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._heeded(), transaction(self._db):
            yield self._db

    @contextmanager
    def _heeded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise _storage_error(exc) from exc


def _storage_error(exc: sqlite3.Error) -> StorageError:
    what = f"the catalogue of files and batches cannot be used: {exc}"
    match (getattr(exc, "sqlite_errorcode", None) or 0) & 0xFF:  # without SQLite's finer distinctions
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StorageBusyError(f"{what}; another program holds it")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StorageDamagedError(f"{what}; restore batch.folder from a copy, or name another folder")
    return StorageError(what)


def _now() -> int:
    return int(time.time())


def _insert_file(db: sqlite3.Connection, file: StoredFile) -> None:
    values = (file.id, file.owner, file.filename, file.purpose, file.num_bytes, file.created_at, file.expires_at)
    db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _batch_row(batch: Batch) -> tuple[str, str, str, str]:
    return batch.id, batch.owner, batch.status, json.dumps(asdict(batch))


def _batch(document: str) -> Batch:
    values = json.loads(document)
    return Batch(**{**values, "errors": tuple(LineError(**error) for error in values["errors"])})
