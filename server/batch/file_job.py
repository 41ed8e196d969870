"""A batch job over files: its input, the recipe of its rows, and what makes it the same job tomorrow."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import BadRow, Row
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.placement.shards import SHARD, Shard
from ensemble_server.server.batch.results.submission import SampleSubmission
from ensemble_server.server.batch.source.inputs import Recipe, read_rows
from ensemble_server.server.batch.source.records import Record, SourceKind, files_of, read_records, skipped_in
from ensemble_server.server.config.problems import nearest

NUM_BAD_SHOWN = 5
INPUT = "the input"  # its name in a job's identity
NEED_A_MODEL = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/classify"})


@dataclass(frozen=True)
class CheckedInput:
    """What one reading of the input found. `bad`: the first few messages of rows that cannot be run. `models`: that
    the others name; None stands for rows that name none. `skipped`: what is no row of a folder.
    """

    num_rows: int
    num_bad: int
    bad: tuple[str, ...]
    models: frozenset[str | None] = frozenset()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileJob:
    """`options`: what else makes the job what it is, each under the flag that said it. `seed`: the job's own.

    `shard`: the part of the rows that this machine answers; None for all.
    """

    source: Path
    kind: SourceKind
    recipe: Recipe
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    shard: Shard | None = None

    def rows(self) -> Iterator[Row | BadRow]:
        """The job's rows in their order. Reads the source anew at every call."""
        rows = read_rows(read_records(self.source, self.kind), self.recipe)
        return rows if self.shard is None else self.shard.rows(rows, len(self.recipe.grid.cells))

    def check(self, sample: SampleSubmission | None) -> CheckedInput:
        """Read the whole input once. Raises `ConfigError` if it has no rows or not those of the sample submission."""
        num_rows = num_bad = 0
        bad: list[str] = []
        models: set[str | None] = set()
        for row in self.rows():
            num_rows += 1
            if isinstance(row, BadRow):
                num_bad += 1
                if len(bad) < NUM_BAD_SHOWN:
                    bad.append(row.error["message"])
            elif row.url in NEED_A_MODEL or row.body.get("model") is not None:
                model = row.body.get("model")
                models.add(model if isinstance(model, str) else None)
        if not num_rows:
            raise ConfigError(f"{self.source}: has no rows")
        if sample is not None:
            sample.check_ids(lambda: (row.custom_id for row in self.rows()))
        skipped = skipped_in(self.source) if self.kind == "folder" else ()
        return CheckedInput(num_rows, num_bad, tuple(bad), frozenset(models), tuple(skipped))

    def identity(self) -> Identity:
        shard = {} if self.shard is None else {SHARD: str(self.shard)}
        return Identity({INPUT: _digest(self.source), **self.options, **shard}, self.seed)

    def open_store(self, path: Path, *, restart: bool, extend: bool = False) -> JobStore:
        """The job's store at `path`, with all rows taken in. `restart` forgets what was there; `extend` lets the input
        have changed, and keeps the answers of the rows that have not. Raises `ConfigError`."""
        if restart:
            discard_job(path)
        if extend and path.exists():
            return self._extended(path)
        store = JobStore.open(path, self.identity())
        try:
            store.take_rows(self.rows())
        except BaseException:
            store.close()
            raise
        return store

    def _extended(self, path: Path) -> JobStore:
        store = JobStore.reopen(path)
        try:
            store.extend(self.rows(), self.identity(), may_change={INPUT})
        except BaseException:
            store.close()
            raise
        return store

    def lacks_id_column(self) -> str | None:
        """What is wrong with `recipe.id_column`, if no record has it; None if one has."""
        column, seen = self.recipe.id_column, None
        if column is None:
            return None
        for record in read_records(self.source, self.kind):
            if column in record.values:
                return None
            if seen is None and isinstance(record, Record):
                seen = list(map(str, record.values))
        if seen is None:
            return None
        return f"there is no column {column!r}{nearest(column, seen)} (there are: {', '.join(seen)})"


def discard_job(path: Path) -> None:
    """Remove a job's file, if there is one. Raises `ConfigError` if another process works on it."""
    if not path.exists():
        return
    try:
        database = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            database.execute("BEGIN EXCLUSIVE")
        finally:
            database.close()
    except sqlite3.OperationalError as exc:
        raise ConfigError(f"{path}: another process works on this job ({exc}); end it first") from exc
    except sqlite3.DatabaseError:
        pass  # no database: nobody works on it, and it is not wanted either
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)


def _digest(source: Path) -> str:
    """The contents of a file, or of all files of a folder with their names; where it lies does not matter."""
    digest = hashlib.sha256()
    files = files_of(source) if source.is_dir() else [source]
    for path in files:
        if source.is_dir():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return f"sha256 {digest.hexdigest()[:16]}"
