"""The rows of a job over a Ray cluster, through Ray Data: every worker is an actor that holds the models of the config.

Answers come back to the machine that began the job and are recorded there as they come, so the job is as durable as on
one machine, and the same command goes on after a kill. Rows are asked with the same seeds, so the output is that of one
machine. Paths in the config must exist on every node. Left out: deadlines and time budgets of a whole job; the limit
per row is `server.request_timeout_s`.

Needs the extra `ray`; nothing of it is imported before a job asks for it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.errors import ConfigError, EngineDeadError, EnsembleError, OverloadedError
from ensemble_server.server.batch.job.identity import model_fingerprints, seeded
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.running.runner import Progress, Summary

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import MemberUsage
    from ensemble_server.server.batch.job.store import JobStore
    from ensemble_server.server.config.blocks import Config

INSTALL = "pip install 'ensemble-server[ray]'"


@dataclass(frozen=True)
class RayOptions:
    """`workers`: actors, each with all models of the config. `cpus`, `gpus`: that Ray reserves for each of them.
    `rows_per_batch`: handed to a worker at a time; it answers them together. `max_restarts`: how often a worker whose
    process has died is started again; Ray's own default is for ever. `init`: for `ray.init` where no cluster runs yet.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    rows_per_batch: int = 64
    max_restarts: int = 2
    init: Mapping[str, Any] = field(default_factory=dict)


def run_on_ray(
    store: JobStore,
    config: Config,
    options: RayOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    watch: FailureWatch | None = None,
) -> Summary:
    """Answer every pending row of `store` and record the answers. Joins the cluster that RAY_ADDRESS names, or that the
    process is part of; else it starts a local one and stops it in the end. `watch` sees every row that ends; once it is
    over for it no more is waited for.

    Raises `ConfigError` without Ray, `ModelLoadError` if a worker cannot load the models, and `EngineDeadError` if
    workers die again and again: what was recorded is kept.
    """
    options, watch = options or RayOptions(), watch or FailureWatch(max_errors=0)
    store.bind_models(model_fingerprints(store.model_names(), config))
    began = time.monotonic()
    done = _Done()
    items, names = [], {}
    for row in _pending(store):
        items.append({"row": pickle.dumps(seeded(row, store.identity.seed))})
        names[row.index] = row.custom_id
    if items:
        with _cluster(options) as ray_data, _told_of_workers(options):
            answers = ray_data.from_items(items, override_num_blocks=_num_blocks(len(items), options)).map_batches(
                _Worker,
                fn_constructor_args=(config,),
                batch_size=options.rows_per_batch,
                concurrency=options.workers,
                num_cpus=options.cpus,
                num_gpus=options.gpus,
                max_restarts=options.max_restarts,
                max_task_retries=options.max_restarts,
            )
            for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
                results = [pickle.loads(result) for result in batch["result"]]
                store.record(results)
                done.count(result for _, result in results)
                for index, result in results:
                    if result.is_ok:
                        watch.answered()
                    else:
                        watch.failed(names[index], result.body)
                if on_progress is not None:
                    on_progress(done.progress(store, options, time.monotonic() - began))
                if watch.is_over:
                    break
    counts = store.counts()
    is_done = not counts.pending and not counts.cut
    return Summary(
        "finished" if is_done else "failing" if watch.is_over else "stopped",
        counts,
        done.prompt_tokens,
        done.completion_tokens,
        store.spent(),
        time.monotonic() - began,
    )


@contextmanager
def _cluster(options: RayOptions) -> Iterator[Any]:
    """`ray.data` of a cluster that runs inside this block at least."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: nobody is told of this job
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise ConfigError(f"--ray needs Ray, which is not installed ({exc}): {INSTALL}") from exc
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(**{"include_dashboard": False, "log_to_driver": False, **options.init})
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray.data
    finally:
        if is_ours:
            ray.shutdown()


@contextmanager
def _told_of_workers(options: RayOptions) -> Iterator[None]:
    """What Ray says of workers that died, in our words."""
    from ray.exceptions import RayError

    try:
        yield
    except EnsembleError:  # a worker's own, which Ray brings here as what it is
        raise
    except RayError as exc:
        reason = next((line for line in reversed(str(exc).splitlines()) if line.strip()), type(exc).__name__)
        raise EngineDeadError(
            f"a worker of Ray died, and died again each of {options.max_restarts} times that it was started anew "
            f"({reason.strip()[:300]}); what was answered is kept. Out of memory, mostly: try fewer workers, or fewer "
            "rows at once"
        ) from exc


def _pending(store: JobStore) -> Iterator[Row]:
    after = -1
    while page := store.pending(after, has_cut=True):
        yield from page
        after = page[-1].index


def _num_blocks(num_rows: int, options: RayOptions) -> int:
    """Enough that every worker has some, and answers come back in batches."""
    return max(1, min(num_rows, max(options.workers, num_rows // options.rows_per_batch)))


@dataclass
class _Done:
    num_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, results: Iterator[RowResult]) -> None:
        for result in results:
            usage = result.body.get("usage", {})
            self.num_rows += 1
            self.prompt_tokens += usage.get("prompt_tokens", 0)
            self.completion_tokens += usage.get("completion_tokens", 0)

    def progress(self, store: JobStore, options: RayOptions, elapsed_s: float) -> Progress:
        counts = store.counts()
        running = min(counts.pending, options.workers * options.rows_per_batch)
        members: Mapping[str, MemberUsage] = store.spent()
        return Progress(counts, running, self.num_rows, self.prompt_tokens, self.completion_tokens, members, elapsed_s)


class _Worker:
    """An actor: the models are loaded when it is made, and live as long as it does."""

    def __init__(self, config: Config) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a batch never asks a hub
        from ensemble_server.server.hosting import Hosting

        self._runner = asyncio.Runner()
        self._models = AsyncExitStack()  # never closed: Ray ends the process
        self._hosting = self._runner.run(self._models.enter_async_context(Hosting.open(config)))

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        rows: list[Row] = [pickle.loads(row) for row in batch["row"]]
        try:
            results = self._runner.run(self._answered(rows))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return {"result": [pickle.dumps((row.index, result)) for row, result in zip(rows, results, strict=True)]}

    async def _answered(self, rows: Sequence[Row]) -> list[RowResult]:
        from ensemble_server.server.batch.running.room import Room, num_sequences, sequences_of

        room = Room(num_sequences(self._hosting))
        async with asyncio.TaskGroup() as group:
            tasks = []
            for row in rows:
                num_places = sequences_of(row, self._hosting)
                await room.take(num_places)
                task = group.create_task(self._one(row))
                task.add_done_callback(lambda _, places=num_places: room.give_back(places))
                tasks.append(task)
        return [task.result() for task in tasks]

    async def _one(self, row: Row) -> RowResult:
        from ensemble_server.server.batch.running.answering import answer

        while True:
            try:
                return await answer(self._hosting, row)
            except OverloadedError as exc:
                await asyncio.sleep(exc.retry_after_s)
