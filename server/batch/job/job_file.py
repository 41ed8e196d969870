"""The SQLite file of a job: opened for one process alone, and SQLite's errors in a user's words."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError, EnsembleError, StorageError
from ensemble_server.server.batch.sqlite_transaction import transaction

_APPLICATION_ID = 0x656E7362  # "ensb": tells a job from other people's SQLite files
_VERSION = 1  # of the schema
_PREPARE = (
    "PRAGMA locking_mode = EXCLUSIVE",  # before WAL mode is entered: then no second process can read or write
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
)


class DamagedJobError(ConfigError):
    """The file of a job is no database any more, or not a whole one."""


class JobFile:
    """An SQLite database that this process alone has. Its methods may be called from any thread; they wait in turn."""

    def __init__(self, path: Path, schema: str) -> None:
        """Open the file at `path`, or make it. `schema`: statements that make the tables, separated by ";".

        Raises `ConfigError` if another process has it open or if it is no job, `StorageError` if it cannot be written.
        """
        self.path = path
        self._turn = threading.Lock()
        with _translated(path):
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(schema)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, schema: str) -> None:
        with _translated(self.path):
            for pragma in _PREPARE:
                self._db.execute(pragma)
        with self.transaction() as db:
            [application_id] = db.execute("PRAGMA application_id").fetchone()
            [version] = db.execute("PRAGMA user_version").fetchone()
            [num_tables] = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if not num_tables and not application_id:
                for statement in schema.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif application_id != _APPLICATION_ID:
                raise ConfigError(f"{self.path} is not the file of a batch job; choose another output, or move it away")
            elif version != _VERSION:
                raise ConfigError(
                    f"{self.path} is a job of version {version}, this program writes version {_VERSION}; finish it with"
                    " the program that began it, or choose another output"
                )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that the block changes is on disk when it ends; nothing is if it raises."""
        with self._turn, _translated(self.path), transaction(self._db):
            yield self._db

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For one query whose rows are all fetched inside the block."""
        with self._turn, _translated(self.path):
            yield self._db

    def close(self) -> None:
        """Give the file free. What was recorded is in it, and in it alone: the log beside it is folded in."""
        with self._turn, _translated(self.path):
            self._db.close()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise _error(path, exc) from exc


def _error(path: Path, exc: sqlite3.Error) -> EnsembleError:
    kind = getattr(exc, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]
    match kind:
        case "BUSY" | "LOCKED":
            return ConfigError(
                f"{path}: another process is working on this job; wait until it has ended, stop it, or choose another"
                " output"
            )
        case "NOTADB":
            return DamagedJobError(f"{path} is not the file of a batch job; choose another output, or move it away")
        case "CORRUPT":
            return DamagedJobError(
                f"{path} is damaged ({exc}); `sqlite3 {path.name} .recover` may save the answers in it. To begin anew,"
                " delete it"
            )
        case "FULL":
            return StorageError(
                f"{path}: the disk is full; what was recorded is kept. Free some space and run the same command again"
            )
    return StorageError(f"{path} cannot be read or written ({exc}); check the folder and its permissions")
