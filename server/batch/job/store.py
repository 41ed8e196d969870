"""The durable side of a batch job: one SQLite file with every row, and every answer as soon as it is there.

What was recorded survives kill -9 and power cuts (WAL, synchronous=FULL: a transaction is on disk when it returns), and
a torn write cannot happen. A row is pending as long as there is no result for it: no state is kept twice. Equal rows
that must have equal answers share one result, kept with the first of them, their *leader*.

The file is locked while it is open (SQLite's exclusive locking, which the kernel frees if the process dies), so a
second process cannot work on the same job. What cannot be written is a `StorageError`, all else a `ConfigError`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.job_file import JobFile
from ensemble_server.server.batch.job.row_columns import difference, result_columns, result_of, row_columns, row_of
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult

_BLOCK = 256  # rows in one transaction or one page: memory stays flat
_SCHEMA = """
    CREATE TABLE job (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE rows (
        place INTEGER PRIMARY KEY, custom_id TEXT, url TEXT, body BLOB NOT NULL, line INTEGER,
        model TEXT, digest BLOB, leader INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX leaders ON rows (digest) WHERE digest IS NOT NULL AND leader = place;
    CREATE INDEX followers ON rows (leader) WHERE leader <> place;
    CREATE TABLE results (
        place INTEGER PRIMARY KEY, status_code INTEGER NOT NULL, request_id TEXT NOT NULL, body BLOB NOT NULL,
        usage TEXT NOT NULL, is_cut INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE spent (
        member TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL
    ) STRICT;
"""  # a bad row has no url, and its error object as its body; place, leader: `Row.index`

_TO_RUN = (
    "FROM rows LEFT JOIN results USING (place) WHERE rows.place > ? AND leader = rows.place AND url IS NOT NULL"
    " AND (status_code IS NULL OR (is_cut AND ?))"
)

_INSERT_ROW = (
    "INSERT INTO rows (place, custom_id, url, body, line, model, digest, leader) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7,"
    " coalesce((SELECT place FROM rows WHERE digest IS NOT NULL AND digest = ?7 AND leader = place), ?1))"
)
_KEEP_RESULTS = """
    INSERT INTO results
    SELECT rows.place, status_code, request_id, answers.body, usage, is_cut FROM rows JOIN temp.answers ON
        answers.place = coalesce(
            (SELECT answered FROM temp.before WHERE rows.digest IS NOT NULL AND before.digest = rows.digest
                AND answered IS NOT NULL LIMIT 1),
            (SELECT answered FROM temp.before WHERE before.custom_id = rows.custom_id AND before.url = rows.url
                AND before.body = rows.body AND answered IS NOT NULL LIMIT 1))
    WHERE rows.leader = rows.place AND rows.url IS NOT NULL
"""  # temp.before: the rows as they were, `answered` the place of their result; temp.answers: the results


@dataclass(frozen=True)
class Counts:
    """How far a job is, in rows; equal rows that share a result all count. `cut`: those of `ok` that run again."""

    total: int = 0
    ok: int = 0
    failed: int = 0
    cut: int = 0

    @property
    def pending(self) -> int:
        return self.total - self.ok - self.failed


@dataclass(frozen=True)
class StoredRow:
    """A row with its result: None while it is pending, and for a bad row."""

    row: Row | BadRow
    result: RowResult | None


class JobStore:
    """An open job. Methods may be called from any thread.

    with JobStore.open(Path("answers.jsonl.job"), Identity({"--template": "..."})) as store:
        store.take_rows(rows)
    """

    def __init__(self, file: JobFile, identity: Identity) -> None:
        self.path = file.path
        self.identity = identity
        self.num_let_go = 0
        self._file = file
        self._counts = self._counted()

    @classmethod
    def open(cls, path: Path, identity: Identity) -> Self:
        """The job at `path`, begun if there is none yet.

        Raises `ConfigError` if another process works on it, or if it was begun with another identity (naming what has
        changed); `StorageError` if the file cannot be had.
        """
        file = JobFile(path, _SCHEMA)
        try:
            with file.transaction() as db:
                stored = _get(db, "identity")
                if stored is None:
                    _set(db, "identity", asdict(identity))
                elif changes := Identity(**stored).changes_to(identity):
                    raise _changed(path, changes)
            return cls(file, identity)
        except BaseException:
            file.close()
            raise

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """The job at `path`, whichever it is. Raises as `open` does, and `ConfigError` if there is none."""
        if not path.exists():
            raise ConfigError(f"{path}: there is no such job")
        file = JobFile(path, _SCHEMA)
        try:
            with file.reading() as db:
                stored = _get(db, "identity")
            if stored is None:
                raise ConfigError(f"{path} holds no job yet")
            return cls(file, Identity(**stored))
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the rows ------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether all rows have been taken in."""
        with self._file.reading() as db:
            return _get(db, "is_complete") is not None

    def take_rows(self, rows: Iterable[Row | BadRow]) -> None:
        """Take in the job's rows, in their order; reads `rows` as a stream. `index` must go up: a shard has gaps in it.

        If the job has its rows already they are compared instead, and the first that differs is a `ConfigError`.
        """
        if self.is_complete:
            self._compare(rows)
            return
        with self._file.transaction() as db:  # what a killed process took in is not known to be right
            db.execute("DELETE FROM rows")
            db.execute("DELETE FROM results")
        block: list[tuple[Any, ...]] = []
        last = -1
        for row in rows:
            assert row.index > last, f"row {row.index} came after row {last}"
            last = row.index
            block.append(row_columns(row))
            if len(block) == _BLOCK:
                self._insert(block)
                block = []
        self._insert(block)
        with self._file.transaction() as db:
            _set(db, "is_complete", True)
        self._counts = self._counted()

    def extend(self, rows: Iterable[Row | BadRow], identity: Identity, *, may_change: Collection[str]) -> None:
        """Put `rows` in the place of the job's rows, all or nothing. A row that was there before, wherever it stood,
        keeps its result: one with the same id and the same body, or one that has the same answer whoever asks.

        `num_let_go` says of how many answers nothing is left. Models that no row names any more no longer bind the job.

        Raises `ConfigError` if `identity` differs in more than the parts `may_change`, and if no row that has been
        answered would be left: that is another input, and the answers are worth more than the mistake.
        """
        before = self.identity
        same = {name: part for name, part in identity.parts.items() if name not in may_change}
        kept = {name: part for name, part in before.parts.items() if name in may_change}
        if changes := before.changes_to(Identity({**same, **kept}, identity.seed)):
            raise _changed(self.path, changes)
        with self._file.transaction() as db:
            db.execute(
                "CREATE TEMP TABLE before AS SELECT rows.*, results.place AS answered FROM rows"
                " LEFT JOIN results ON results.place = rows.leader"
            )
            db.execute("CREATE INDEX temp.by_id ON before (custom_id)")
            db.execute("CREATE INDEX temp.by_digest ON before (digest)")
            db.execute("CREATE TEMP TABLE answers AS SELECT * FROM results")
            db.execute("CREATE INDEX temp.by_place ON answers (place)")
            db.execute("DELETE FROM rows")
            db.execute("DELETE FROM results")
            for row in rows:
                db.execute(_INSERT_ROW, row_columns(row))
            db.execute(_KEEP_RESULTS)
            num_before, num_kept = (
                db.execute(f"SELECT count(*) FROM {table} WHERE status_code = 200").fetchone()[0]
                for table in ("temp.answers", "results")
            )
            if num_before and not num_kept:
                raise ConfigError(
                    f"{self.path}: none of the {num_before} answers that it has belongs to a row of the input; is it"
                    " the right one? Choose another output, or --restart to forget the answers"
                )
            named = {name for (name,) in db.execute("SELECT DISTINCT model FROM rows WHERE url IS NOT NULL")}
            if None not in named:
                bound: dict[str, str] = _get(db, "models") or {}
                _set(db, "models", {name: fingerprint for name, fingerprint in bound.items() if name in named})
            for table in ("before", "answers"):
                db.execute(f"DROP TABLE temp.{table}")
            _set(db, "identity", asdict(identity))
            _set(db, "is_complete", True)
        self.identity = identity
        self.num_let_go = max(0, num_before - num_kept)
        self._counts = self._counted()

    def _insert(self, block: Sequence[tuple[Any, ...]]) -> None:
        with self._file.transaction() as db:
            db.executemany(_INSERT_ROW, block)

    def _compare(self, rows: Iterable[Row | BadRow]) -> None:
        stored = self.rows()
        num_rows = 0
        for row in rows:
            before = next(stored, None)
            if before is None:
                raise _changed(self.path, [f"the input had {num_rows} rows, and now has more"])
            if row_columns(before.row) != row_columns(row):
                raise _changed(self.path, [difference(before.row, row)])
            num_rows += 1
        if next(stored, None) is not None:
            raise _changed(self.path, [f"the input had {self._counts.total} rows, and now has {num_rows}"])

    def rows(self) -> Iterator[StoredRow]:
        """All rows in their order, with what became of them; reads as a stream."""
        place = -1
        while True:
            with self._file.reading() as db:
                page = db.execute(
                    "SELECT rows.place, custom_id, url, rows.body, line, status_code, request_id, results.body, usage,"
                    " is_cut FROM rows LEFT JOIN results ON results.place = rows.leader WHERE rows.place > ?"
                    " ORDER BY rows.place LIMIT ?",
                    (place, _BLOCK),
                ).fetchall()
            for place, custom_id, url, body, line, *result in page:
                row = row_of(place, custom_id, url, body, line)
                yield StoredRow(row, None if result[0] is None else result_of(*result))
            if len(page) < _BLOCK:
                return

    def pending(self, after: int = -1, *, limit: int = 256, has_cut: bool = False) -> list[Row]:
        """The next rows to run beyond index `after`, one for each set of rows that share an answer.

        `has_cut`: those whose answer a deadline cut short too.
        """
        with self._file.reading() as db:
            page = db.execute(
                f"SELECT rows.place, custom_id, url, rows.body, line {_TO_RUN} ORDER BY rows.place LIMIT ?",
                (after, has_cut, limit),
            ).fetchall()
        return [row for columns in page if isinstance(row := row_of(*columns), Row)]  # `_TO_RUN` finds no others

    def num_to_run(self) -> int:
        """How many rows `pending` gives, cut ones included: fewer than are pending where rows share an answer."""
        with self._file.reading() as db:
            [num_rows] = db.execute(f"SELECT count(*) {_TO_RUN}", (-1, True)).fetchone()
        return num_rows

    # --- the models ----------------------------------------------------------------------------------------------

    def model_names(self) -> set[str | None]:
        """The models that rows name; None stands for rows that name none."""
        with self._file.reading() as db:
            return {name for (name,) in db.execute("SELECT DISTINCT model FROM rows WHERE url IS NOT NULL")}

    def models(self) -> dict[str, str]:
        """The fingerprints that the job is held to, by the models' names."""
        with self._file.reading() as db:
            return _get(db, "models") or {}

    def bind_models(self, fingerprints: Mapping[str, str]) -> None:
        """Hold the job to these models. Raises `ConfigError` that names those that have changed since it began.

        A model that the job has not met yet (one that the config lacked before) is added.
        """
        with self._file.transaction() as db:
            before = _get(db, "models") or {}
            changes = [
                f"model {name!r} is no longer in the config"
                if name not in fingerprints
                else f"model {name!r} is not what it was (its entry in the config, those of its members, or the"
                " installed versions)"
                for name in before
                if before[name] != fingerprints.get(name)
            ]
            if changes:
                raise _changed(self.path, changes)
            _set(db, "models", {**before, **fingerprints})

    # --- the results ---------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """How far the job is; costs nothing."""
        return self._counts

    def spent(self) -> dict[str, MemberUsage]:
        """What each single model read, wrote and cost for this job so far, over all its runs."""
        with self._file.reading() as db:
            return {member: MemberUsage(*used) for member, *used in db.execute("SELECT * FROM spent ORDER BY member")}

    def record(self, results: Sequence[tuple[int, RowResult]]) -> None:
        """Keep these results, all or none; (index of the row, result). On disk when this returns.

        A row must have no result yet, or one that was cut short.
        """
        counts = self._counts
        with self._file.transaction() as db:
            for place, result in results:
                counts = _counted_with(db, counts, place, result)
                _insert_result(db, place, result)
        self._counts = counts

    def forget_errors(self) -> int:
        """Make failed rows pending again; returns how many. Rows that can never be run stay as they are."""
        before = self._counts
        with self._file.transaction() as db:
            db.execute("DELETE FROM results WHERE status_code >= 400")
        self._counts = self._counted()
        return self._counts.pending - before.pending

    def failures(self) -> Iterator[str]:
        """The message of every row that has failed or cannot be run, rows that share an answer each for itself."""
        with self._file.reading() as db:
            found = db.execute(
                "SELECT coalesce(results.body, rows.body), url FROM rows LEFT JOIN results"
                " ON results.place = rows.leader WHERE url IS NULL OR status_code >= 400 ORDER BY rows.place"
            ).fetchall()
        for body, url in found:
            error = orjson.loads(body)
            yield (error if url is None else error["error"])["message"]

    def _counted(self) -> Counts:
        with self._file.reading() as db:
            counted = db.execute(
                "SELECT count(*), total(status_code < 400), total(status_code >= 400 OR url IS NULL), total(is_cut)"
                " FROM rows LEFT JOIN results ON results.place = rows.leader"
            ).fetchone()
        return Counts(*map(int, counted))


# --- inside transactions -------------------------------------------------------------------------------------------


def _counted_with(db: sqlite3.Connection, counts: Counts, place: int, result: RowResult) -> Counts:
    """`counts` once the row in this place and those that share its answer have this result."""
    [was_cut] = db.execute("SELECT is_cut FROM results WHERE place = ?", (place,)).fetchone() or [None]
    assert was_cut is None or was_cut, f"row {place} has a result already"
    [num_followers] = db.execute("SELECT count(*) FROM rows WHERE leader = ? AND leader <> place", (place,)).fetchone()
    num_rows = 1 + num_followers
    if was_cut:
        counts = replace(counts, ok=counts.ok - num_rows, cut=counts.cut - num_rows)
    if not result.is_ok:
        return replace(counts, failed=counts.failed + num_rows)
    return replace(counts, ok=counts.ok + num_rows, cut=counts.cut + num_rows * result.is_cut)


def _insert_result(db: sqlite3.Connection, place: int, result: RowResult) -> None:
    db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", (place, *result_columns(result)))
    db.executemany(
        "INSERT INTO spent VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
        " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
        " completion_tokens = completion_tokens + excluded.completion_tokens, cost = cost + excluded.cost",
        [(member, used.prompt_tokens, used.completion_tokens, used.cost) for member, used in result.usage.items()],
    )


def _get(db: sqlite3.Connection, name: str) -> Any:
    found = db.execute("SELECT value FROM job WHERE name = ?", (name,)).fetchone()
    return found and json.loads(found[0])


def _set(db: sqlite3.Connection, name: str, value: Any) -> None:
    db.execute("INSERT OR REPLACE INTO job VALUES (?, ?)", (name, json.dumps(value)))


def _changed(path: Path, changes: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{path} is the job of another run: {'; '.join(changes)}. Run the command as it was to continue it, choose"
        " another output, or delete the file to begin anew. If the input has more rows now, --extend keeps the answers"
        " of those that are as they were"
    )


def job_path(output: Path) -> Path:
    """Where the job of an output file lies: beside it. answers.jsonl -> answers.jsonl.job"""
    return output.with_name(f"{output.name}.job")
