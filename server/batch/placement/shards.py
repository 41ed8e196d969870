"""One job on several machines: each answers its shard of the rows, and the outputs are joined again.

Shard i of n (from 1) holds every n-th record of the input, with all its cells, so shards are equally large and slow
rows spread over all of them. Rows keep the index that they have in the whole job, and the `id` of an output line is a
hash of it; so a merge can tell from outputs alone where each line belongs, that none is missing or there twice, and it
writes the very bytes that one machine would have written.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import BadRow, Row
from ensemble_server.server.batch.job.store import JobStore, StoredRow, job_path
from ensemble_server.server.batch.results.output_line import NOT_RUN, line_id
from ensemble_server.server.disk.whole_file import whole_file

MAX_SHARDS = 10_000
MAX_GAP = 200_000  # rows between two of one shard: shards x cells
SHARD = "--shard"  # its name in a job's identity


@dataclass(frozen=True)
class Shard:
    """`number` counts from 1 to `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "2/4" -> Shard(2, 4). Raises `ValueError`."""
        number, _, count = text.partition("/")
        if not (_is_count(number) and _is_count(count)) or not 1 <= int(number) <= int(count) <= MAX_SHARDS:
            raise ValueError(f"must be i/n with i from 1 to n and n at most {MAX_SHARDS}, such as 2/4, got {text!r}")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, index: int, num_cells: int = 1) -> bool:
        """Whether the row at `index` is in this shard. `num_cells`: rows that each record of the input makes."""
        return index // num_cells % self.count == self.number - 1

    def rows(self, rows: Iterable[Row | BadRow], num_cells: int = 1) -> Iterator[Row | BadRow]:
        return (row for row in rows if self.holds(row.index, num_cells))


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 9


@dataclass(frozen=True)
class Merged:
    """`num_failed`: rows whose line is an error; `num_pending`: of these, rows that no shard has answered yet.
    `is_checked`: the shards' job files were there and say that they are shards of one job."""

    num_rows: int
    num_failed: int
    num_pending: int
    is_checked: bool


# --- outputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    index: int
    source: Path
    text: bytes
    values: Mapping[str, Any]


def merge_outputs(sources: Sequence[Path], output: Path) -> Merged:
    """Join JSONL outputs of all shards of a job, in the input's order. Raises `ConfigError`, and writes nothing then.

    Where the shards' job files lie beside all outputs, it is checked that they are shards of one job and complete.
    """
    is_checked = _check_jobs_beside(sources)
    num_rows = num_failed = num_pending = 0
    models: dict[str, tuple[str, Path]] = {}
    with whole_file(output) as file:
        for line in _in_order(heapq.merge(*map(_lines, sources), key=lambda line: line.index)):
            _check_model(line, models)
            file.write(line.text)
            num_rows += 1
            num_failed += line.values["error"] is not None
            num_pending += (line.values["error"] or {}).get("code") == NOT_RUN["code"]
        if not num_rows:
            raise ConfigError(f"{', '.join(map(str, sources))}: there are no rows to merge")
    return Merged(num_rows, num_failed, num_pending, is_checked)


def _lines(source: Path) -> Iterator[_Line]:
    """The lines of one output, each with the place in the whole job that its id proves. Raises `ConfigError`."""
    index = -1
    with source.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                values = orjson.loads(text)
                found, custom_id = values["id"], values["custom_id"]
                assert "error" in values
            except (orjson.JSONDecodeError, KeyError, TypeError, AssertionError) as exc:
                raise ConfigError(
                    f"{source}, line {number}: is no whole line of a batch's output; merge takes the JSONL that "
                    "`ensemble batch --shard i/n` wrote, or the .job files beside tables"
                ) from exc
            after = index
            index = next((at for at in range(after + 1, after + 1 + MAX_GAP) if line_id(at, custom_id) == found), -1)
            if index < 0:
                raise ConfigError(
                    f"{source}, line {number}: its id does not say that {custom_id!r} comes here; the lines of an "
                    "output must stay as they were written"
                )
            yield _Line(index, source, text if text.endswith(b"\n") else text + b"\n", values)


def _in_order(lines: Iterable[_Line]) -> Iterator[_Line]:
    """`lines`, checked to be all rows from 0, each once."""
    before: _Line | None = None
    for line in lines:
        expected = 0 if before is None else before.index + 1
        if line.index < expected and before is not None:
            raise ConfigError(
                f"row {line.index} ({line.values['custom_id']!r}) stands in {before.source} and in {line.source}; "
                "give each shard once"
            )
        if line.index > expected:
            raise ConfigError(
                f"row {expected} is in none of the files; the next one is {line.values['custom_id']!r} in "
                f"{line.source}. Give the outputs of all shards"
            )
        yield line
        before = line


def _check_model(line: _Line, models: dict[str, tuple[str, Path]]) -> None:
    """Raise `ConfigError` if two shards were answered by models of one name that are not the same."""
    body = (line.values.get("response") or {}).get("body") or {}
    model, fingerprint = body.get("model"), body.get("system_fingerprint")
    if not isinstance(model, str) or not isinstance(fingerprint, str):
        return
    first, source = models.setdefault(model, (fingerprint, line.source))
    if first != fingerprint:
        raise ConfigError(
            f"model {model!r} was another one in {source} ({first}) than in {line.source} ({fingerprint}): its config "
            "or the installed versions differ between the machines, so these are shards of different jobs"
        )


def _check_jobs_beside(sources: Sequence[Path]) -> bool:
    jobs = [job_path(source) for source in sources]
    if not all(job.exists() for job in jobs):
        return False
    with ExitStack() as stack:
        _whole([stack.enter_context(JobStore.reopen(job)) for job in jobs])
    return True


# --- jobs ---------------------------------------------------------------------------------------------------------


def merge_jobs(sources: Sequence[Path], output: Path) -> Merged:
    """Join the job files of all shards into that of the whole job. Raises `ConfigError` if they are not all of one.

    The command without `--shard` then goes on from there: it answers what is pending and writes in any format.
    """
    with ExitStack() as stack:
        stores = [stack.enter_context(JobStore.reopen(source)) for source in sources]
        whole = _whole(stores)
        if output.exists():
            raise ConfigError(f"{output} exists already; choose another place for the merged job")
        try:
            with JobStore.open(output, whole) as merged:
                merged.take_rows(stored.row for stored in _stored(stores))
                merged.bind_models(_one_of_each(stores))
                _copy_results(stores, merged)
                counts = merged.counts()
        except BaseException:
            for suffix in ("", "-wal", "-shm"):
                output.with_name(output.name + suffix).unlink(missing_ok=True)
            raise
    return Merged(counts.total, counts.failed + counts.pending, counts.pending, is_checked=True)


def _whole(stores: Sequence[JobStore]) -> Identity:
    """The identity of the whole job. Raises `ConfigError` unless `stores` are all of its shards, each once."""
    first, shards = _without_shard(stores[0].identity), {}
    for store in stores:
        if changes := first.changes_to(_without_shard(store.identity)):
            raise ConfigError(f"{stores[0].path} and {store.path} are shards of different jobs: {'; '.join(changes)}")
        if (text := store.identity.parts.get(SHARD)) is None:
            raise ConfigError(f"{store.path} is a whole job and no shard of one; there is nothing to merge")
        if not store.is_complete:
            raise ConfigError(f"{store.path} has not taken in all its rows; run its command again")
        shard = Shard.parse(text)
        if (other := shards.setdefault(shard, store.path)) is not store.path:
            raise ConfigError(f"{other} and {store.path} are both shard {shard}")
    counts = {shard.count for shard in shards}
    if len(counts) > 1:
        raise ConfigError(f"the job was divided differently: there are shards of {' and of '.join(map(str, counts))}")
    missing = sorted(set(range(1, counts.pop() + 1)) - {shard.number for shard in shards})
    if missing:
        raise ConfigError(f"shard {missing[0]} is missing; give those of all machines")
    return first


def _without_shard(identity: Identity) -> Identity:
    return replace(identity, parts={name: value for name, value in identity.parts.items() if name != SHARD})


def _one_of_each(stores: Sequence[JobStore]) -> dict[str, str]:
    models: dict[str, str] = {}
    for store in stores:
        for name, fingerprint in store.models().items():
            if models.setdefault(name, fingerprint) != fingerprint:
                raise ConfigError(f"model {name!r} was another one in {store.path}: its config or the versions differ")
    return models


def _stored(stores: Sequence[JobStore]) -> Iterator[StoredRow]:
    return heapq.merge(*(store.rows() for store in stores), key=lambda stored: stored.row.index)


def _copy_results(stores: Sequence[JobStore], merged: JobStore) -> None:
    """Rows that share an answer across shards keep the one of their first."""
    stored = _stored(stores)
    after = -1
    while page := merged.pending(after):
        results = []
        for row in page:
            found = next(one for one in stored if one.row.index == row.index)
            if found.result is not None:
                results.append((row.index, found.result))
        merged.record(results)
        after = page[-1].index
