"""One member in memory at a time: load it, have it answer all that the rows want of it, free it, take the next.

An ensemble of texts is run over a log of its members' answers (`server.batch.call_log`). What is not in the log is
noted; then each member is loaded once and makes all its noted calls; then the ensemble is run again, now to its end.
A judge or an aggregator reads the members' answers, so its calls come up in the second round. The methods' code is the
same as ever, and knows nothing of this.

    round 1   rows -> calls of the members      load base, answer, free; load code, answer, free; ...
    round 2   rows -> calls of the aggregator   load it, answer, free
    round 3   rows -> answers

Killed at any moment, the next run finds the calls that were answered in the log. Members that stand on the same weights
(adapters, other system prompts) are loaded together. What cannot work this way says why (`check_can_be_sequential`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ensembles.base import Answer, Embedder, Model, collect
from ensembles.errors import ConfigError, DeadlineError, EngineDeadError, EnsembleError, OverloadedError
from ensembles.exchange_of_thought import ExchangeOfThought
from ensembles.method import MethodConfig, Services
from ensembles.probability_averaging import ProbabilityAverage
from ensembles.routing import Routing
from server.batch.answering import answer as answer_row
from server.batch.call_log import Call, CallLog, NotRecordedError, RecordedDistributions, RecordedModel
from server.batch.identity import model_fingerprints, seeded
from server.batch.room import num_sequences
from server.batch.rows import Row, RowResult
from server.batch.runner import Summary
from server.batch.store import JobStore
from server.config import Config, HostedModel, RemoteModel
from server.fingerprints import fingerprint
from server.hosting import Hosting, compose

if TYPE_CHECKING:
    from server.surface import Surface

ROWS_AT_ONCE = 256
_REFUSED = {
    ExchangeOfThought.Config: "its members answer each other, so every round would load all of them again",
    Routing.Config: "which member a row asks next depends on how the one before did",
}

# --- what is loaded when ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Models that are loaded together. `weights`: the entries whose weights they stand on; none for remote ones."""

    models: tuple[str, ...]
    weights: tuple[str, ...]


def check_can_be_sequential(config: Config, name: str) -> None:
    """Raise `ConfigError` with the reason if model `name` needs its members in memory at the same time."""
    entry = config.models[name]
    if isinstance(entry, ProbabilityAverage.Config) and len(_weights_of(config, name)) > 1:
        raise ConfigError(
            f"model {name!r} averages its members' next-token distributions at every token, so all of them must be in "
            "memory at the same time; keep --residency resident, or vote among their texts (crowd_vote, majority)"
        )
    for name_, part in _composed(config, name).items():
        for cls, reason in _REFUSED.items():
            if isinstance(part, cls):
                raise ConfigError(
                    f"model {name_!r} ({part.method}) cannot run member by member: {reason}; keep --residency resident"
                )


def _composed(config: Config, name: str) -> dict[str, MethodConfig]:
    """The ensembles of texts that `name` is made of, itself among them."""
    entry = config.models[name]
    if not isinstance(entry, MethodConfig) or isinstance(entry, ProbabilityAverage.Config):
        return {}
    inner = {found: part for other in sorted(entry.references()) for found, part in _composed(config, other).items()}
    return {name: entry, **inner}


def _singles(config: Config, names: Iterable[str]) -> tuple[str, ...]:
    """The models at the bottom that answer by themselves, in the config's order."""
    found = set()
    for name in names:
        composed = _composed(config, name)
        found |= {part for entry in composed.values() for part in entry.references() if part not in composed}
        if not composed:
            found.add(name)
    return tuple(name for name in config.models if name in found and not _composed(config, name))


def _weights_of(config: Config, name: str) -> tuple[str, ...]:
    """The entries with weights that a model stands on."""
    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return tuple(sorted({root for member in entry.references() for root in _weights_of(config, member)}))
    return () if isinstance(entry, RemoteModel) else (entry.base or name,)


def phases(config: Config, names: Iterable[str]) -> tuple[Phase, ...]:
    """What is loaded for models `names`, one after the other: an average of several members counts as one."""
    by_weights: dict[tuple[str, ...], list[str]] = {}
    for single in _singles(config, names):
        by_weights.setdefault(_weights_of(config, single), []).append(single)
    return tuple(Phase(tuple(models), weights) for weights, models in by_weights.items())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of weights, from the checkpoints' headers: of each phase, and of all that would be resident otherwise.

    `available`: what the machine has free. Caches come on top; `engine.max_batch` and `max_context` bound them.
    """

    phases: Mapping[Phase, int]
    resident: int
    available: int

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)

    def sentences(self) -> Iterator[str]:
        for phase, num_bytes in self.phases.items():
            yield f"{', '.join(phase.models)}: {_megabytes(num_bytes)} of weights"
        yield (
            f"at most {_megabytes(self.peak)} of weights at a time instead of {_megabytes(self.resident)}; "
            f"{_megabytes(self.available)} are free"
        )
        if self.peak > self.available:
            yield "warning: the largest of these does not fit into what is free"


def estimated_memory(config: Config, names: Iterable[str]) -> MemoryEstimate:
    """Reads headers, loads nothing. Raises `ModelLoadError` for a checkpoint that is not there."""
    import psutil

    sizes = {phase: {root: _stored_bytes(config, root) for root in phase.weights} for phase in phases(config, names)}
    adapters = {phase: sum(_adapter_bytes(config, model) for model in phase.models) for phase in sizes}
    roots = {root: size for parts in sizes.values() for root, size in parts.items()}
    return MemoryEstimate(
        {phase: sum(parts.values()) + adapters[phase] for phase, parts in sizes.items()},
        sum(roots.values()) + sum(adapters.values()),
        psutil.virtual_memory().available,
    )


def _stored_bytes(config: Config, root: str) -> int:
    from server.checkpoints import resolve_checkpoint
    from server.footprint import read_weights

    entry = config.models[root]
    assert isinstance(entry, HostedModel), f"{root!r} has weights"
    assert entry.path is not None, f"{root!r} has weights of its own"
    folder = resolve_checkpoint(entry.path, relative_to=config.source.parent, may_download=False)
    return read_weights(folder).bytes_as(entry.dtype)


def _adapter_bytes(config: Config, name: str) -> int:
    from server.footprint import read_weights

    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return sum(_adapter_bytes(config, member) for member in entry.references())
    adapter = entry.adapter if isinstance(entry, HostedModel) else None
    return 0 if adapter is None else read_weights(Path(adapter)).num_bytes


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


# --- the run ------------------------------------------------------------------------------------------------------

_noted: ContextVar[list[Call]] = ContextVar("calls that the row being answered wants and that have no answer yet")


async def run_sequential(
    store: JobStore,
    config: Config,
    log: CallLog,
    *,
    concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    is_over: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Answer every pending row of `store`, with one phase of the models in memory at a time.

    Errors of rows are results. `stop`: set it to end soon. `is_over`: whether a deadline has passed; then no more calls
    begin, members that were not asked count as silent, and what comes of that is kept as cut: it runs again when the
    job is continued. `say` is told of every phase. Raises `ConfigError` if a model that rows name cannot run this way,
    and what loading a model raises. Continue with the same call.
    """
    began = time.monotonic()
    names = tuple(model_fingerprints(store.model_names(), config))
    for name in names:
        check_can_be_sequential(config, name)
    await asyncio.to_thread(store.bind_models, model_fingerprints(store.model_names(), config))
    await asyncio.to_thread(log.forget_errors)
    run = _SequentialRun(store, config, log, names, concurrency, stop or asyncio.Event(), is_over, say)
    while await run.next_round():
        pass
    counts = store.counts()
    is_done = not counts.pending and not counts.cut
    return Summary(
        "finished" if is_done else "deadline" if is_over() else "stopped",
        counts,
        run.prompt_tokens,
        run.completion_tokens,
        store.spent(),
        time.monotonic() - began,
    )


class _SequentialRun:
    def __init__(
        self,
        store: JobStore,
        config: Config,
        log: CallLog,
        names: Sequence[str],
        concurrency: int | None,
        stop: asyncio.Event,
        is_over: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._config = config
        self._log = log
        self._phases = phases(config, names)
        self._concurrency = concurrency
        self._stop = stop
        self._is_over = is_over
        self._say = say
        self._is_late = False  # rows get the best that the log has
        self._replayed = _replayed(config, names, log, self._note)
        self.prompt_tokens = 0  # of the rows that were answered
        self.completion_tokens = 0

    async def next_round(self) -> bool:
        """Answer the calls that are noted, then run the rows over the log. Returns whether there is more to do."""
        for phase in self._phases:
            if not self._must_end:
                await self._load_and_answer(phase)
        if self._stop.is_set():
            return False
        self._is_late = self._is_over()
        return await self._replay() > 0 and not self._is_late

    @property
    def _must_end(self) -> bool:
        return self._stop.is_set() or self._is_over()

    def _note(self, call: Call) -> None:
        _noted.get().append(call)
        if self._is_late:
            raise DeadlineError(f"member {call.model!r} was not asked before the deadline")

    # --- phases: models answer calls ---

    async def _load_and_answer(self, phase: Phase) -> None:
        num_open = await asyncio.to_thread(self._log.num_open, phase.models)
        if not num_open:
            return
        self._say(f"loading {', '.join(phase.models)} for {num_open} calls")
        async with Hosting.open(_excerpt(self._config, phase.models)) as hosting:
            page_size = 2 * (self._concurrency or num_sequences(hosting))
            while not self._must_end:
                calls = await asyncio.to_thread(self._log.open_calls, phase.models, limit=page_size)
                if not calls:
                    break
                results = await asyncio.gather(*(_answered(hosting, call) for call in calls))
                if hosting.failure is not None:
                    raise EngineDeadError(hosting.failure)
                await asyncio.to_thread(self._log.record, results)
        del hosting
        _free_memory()

    # --- rows over the log ---

    async def _replay(self) -> int:
        """Answer the pending rows that can be answered; note what the others want. Returns how many calls are new."""
        num_noted, after = 0, -1
        with _quiet_about_missing_calls():
            while rows := await asyncio.to_thread(self._store.pending, after, limit=ROWS_AT_ONCE, has_cut=True):
                outcomes = await asyncio.gather(*(self._over_the_log(row) for row in rows))
                noted = {call.key: call for _, calls in outcomes for call in calls}
                await asyncio.to_thread(self._log.note, noted.values())
                results = [(row.index, result) for row, (result, _) in zip(rows, outcomes, strict=True) if result]
                await asyncio.to_thread(self._store.record, results)
                self._count(result for _, result in results)
                num_noted += len(noted)
                after = rows[-1].index
        counts = self._store.counts()
        self._say(f"{counts.ok + counts.failed} of {counts.total} rows are done, {num_noted} calls to make")
        return num_noted

    async def _over_the_log(self, row: Row) -> tuple[RowResult | None, list[Call]]:
        """The row's result, or None and the calls that it waits for."""
        noted: list[Call] = []

        async def answered() -> RowResult | None:
            _noted.set(noted)  # in this task's context, which the tasks of the ensembles below it copy
            try:
                return await answer_row(self._replayed, seeded(row, self._store.identity.seed))
            except NotRecordedError:
                return None

        result = await asyncio.create_task(answered())
        if self._is_late and noted and result is not None and result.is_ok:
            return replace(result, is_cut=True), noted
        return (None, noted) if noted else (result, [])

    def _count(self, results: Iterable[RowResult]) -> None:
        for result in results:
            usage = result.body.get("usage", {})
            self.prompt_tokens += usage.get("prompt_tokens", 0)
            self.completion_tokens += usage.get("completion_tokens", 0)


async def _answered(hosting: Hosting, call: Call) -> tuple[bytes, Answer | EnsembleError]:
    while True:
        try:
            return call.key, await collect(hosting.models[call.model], replace(call.request, priority=1))
        except OverloadedError as exc:
            await asyncio.sleep(exc.retry_after_s)
        except EnsembleError as exc:
            return call.key, exc


def _excerpt(config: Config, names: Sequence[str]) -> Config:
    """`config` with these models and what they stand on, and no others."""
    needed: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        entry = config.models[name]
        needed.add(name)
        if isinstance(entry, MethodConfig):
            queue += entry.references()
        elif isinstance(entry, HostedModel) and entry.base:
            queue.append(entry.base)
    return config.model_copy(update={"models": {name: config.models[name] for name in config.models if name in needed}})


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- ensembles over the log ---------------------------------------------------------------------------------------


class _ReplayedHosting(Hosting):
    """Ensembles as they are, over members that are recorded. Tokenizers are loaded when they are needed."""

    def __init__(self, config: Config, models: Mapping[str, Model], embedder: Embedder) -> None:
        super().__init__(config, models, {}, None, embedder)
        self._surfaces: dict[str, Surface] = {}

    def surface(self, name: str) -> Surface | None:
        from transformers import AutoTokenizer

        from server.checkpoints import resolve_checkpoint
        from server.members import member_surface

        entry = self.config.models[name]
        if isinstance(entry, MethodConfig):
            members = (member for member in entry.members)
            return next((surface for member in members if (surface := self.surface(member)) is not None), None)
        if isinstance(entry, RemoteModel):
            return None
        if name not in self._surfaces:
            root = self.config.models[entry.base or name]
            folder = resolve_checkpoint(root.path, relative_to=self.config.source.parent, may_download=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._surfaces[name] = member_surface(name, self.config.models, tokenizer)
        return self._surfaces[name]


def _replayed(config: Config, names: Sequence[str], log: CallLog, note: Callable[[Call], None]) -> Hosting:
    from server.embeddings import SentenceEmbedder
    from server.reranking import CrossEncoderReranker

    recorded: dict[str, Model] = {}
    for name in _singles(config, names):
        entry = config.models[name]
        cls = RecordedModel if isinstance(entry, RemoteModel) else RecordedDistributions
        members = tuple(entry.members) if isinstance(entry, MethodConfig) else (name,)
        recorded[name] = cls(
            name,
            log,
            fingerprint=fingerprint(name, config),
            note=note,
            members=members,
        )
    embedder = SentenceEmbedder(config.embedding.path, batch_size=config.embedding.batch_size)
    services = Services(
        embedder,
        partial(CrossEncoderReranker, relative_to=config.source.parent),
        max_calls=config.server.max_calls,
    )
    composed = {found: entry for name in names for found, entry in _composed(config, name).items()}
    return _ReplayedHosting(config, compose(composed, recorded, services), embedder)


@contextmanager
def _quiet_about_missing_calls() -> Iterator[None]:
    """A call that is only being noted is no member that failed, of which the log need hear."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(isinstance(value, NotRecordedError) for value in record.args or ())

    logger = logging.getLogger("ensembles.fan_out")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
