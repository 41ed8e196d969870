"""The durable side of a batch job: one SQLite file with every row, and every answer as soon as it is there.

What was recorded survives kill -9 and power cuts (WAL, synchronous=FULL: a transaction is on disk when it returns), and
a torn write cannot happen. A row is pending as long as there is no result for it: no state is kept twice. Equal rows
that must have equal answers share one result, kept with the first of them (`leader`).

The file is locked while it is open (SQLite's exclusive locking, which the kernel frees if the process dies), so a
second process cannot work on the same job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ensembles.base import MemberUsage
from server.batch.identity import Identity
from server.batch.rows import BadRow, Row, RowResult


@dataclass(frozen=True)
class Counts:
    """How far a job is, in rows; equal rows that share a result all count. `cut`: of those that are `ok`."""

    total: int
    ok: int
    failed: int
    cut: int

    @property
    def pending(self) -> int:
        return self.total - self.ok - self.failed


@dataclass(frozen=True)
class StoredRow:
    """A row with its result: None while it is pending, and for a bad row."""

    row: Row | BadRow
    result: RowResult | None


class JobStore:
    """An open job. Methods may be called from any thread. Errors are `ConfigError`s that say the way out.

    with JobStore.open(Path("answers.jsonl.job"), Identity({"input": ...})) as store:
        store.take_rows(rows)
    """

    path: Path
    identity: Identity

    @classmethod
    def open(cls, path: Path, identity: Identity) -> Self:
        """The job at `path`, begun if there is none yet. Raises `ConfigError` if another process works on it, if it is
        the job of another input or other options (naming what changed), or if the file cannot be had."""
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_complete(self) -> bool:
        """Whether all rows have been taken in."""
        raise NotImplementedError

    def take_rows(self, rows: Iterable[Row | BadRow]) -> None:
        """Take in the job's rows, in their order; reads `rows` as a stream.

        If the job has its rows already they are compared instead, and the first that differs is a `ConfigError`.
        """
        raise NotImplementedError

    def counts(self) -> Counts:
        raise NotImplementedError

    def spent(self) -> dict[str, MemberUsage]:
        """What each single model read, wrote and cost for this job so far, over all its runs."""
        raise NotImplementedError

    def model_names(self) -> list[str | None]:
        """The models that rows name; None stands for rows that name none."""
        raise NotImplementedError

    def bind_models(self, fingerprints: dict[str, str]) -> None:
        """Hold the job to these models. Raises `ConfigError` that names those that have changed since it began."""
        raise NotImplementedError

    def pending(self, after: int = -1, *, limit: int = 256, has_cut: bool = False) -> list[Row]:
        """The next rows to run beyond index `after`, one for each set of rows that share an answer.

        `has_cut`: those whose answer a deadline cut short too.
        """
        raise NotImplementedError

    def record(self, results: Sequence[tuple[int, RowResult]]) -> None:
        """Keep these results, all or none; (index of the row, result). On disk when this returns.

        A second result for a row that is done is refused, unless the first one was cut short.
        """
        raise NotImplementedError

    def forget_errors(self) -> int:
        """Make failed rows pending again; returns how many. Rows that can never be run stay as they are."""
        raise NotImplementedError

    def rows(self) -> Iterator[StoredRow]:
        """All rows in their order, with what became of them; reads as a stream."""
        raise NotImplementedError


def job_path(output: Path) -> Path:
    """Where the job of an output file lies: beside it. answers.jsonl -> answers.jsonl.job"""
    return output.with_name(f"{output.name}.job")
