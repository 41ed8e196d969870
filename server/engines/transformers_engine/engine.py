"""Continuous batching of mixtures. Requests join and leave between steps; one step is

    admit → plan: one token of every live choice, a chunk of the prompts → forward each member on its rows
    → pool → sample once → tell every member (its row grows by that token in the next step)

One thread owns all of this; asyncio tasks hand requests in and read events out. Between two steps the thread looks for
cancelled and expired requests, so hanging up costs one step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch

from ensemble_server.ensembles.base import AveragedOver, Done, Event, GenerationRequest, Mixture, PoolName
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    EngineDeadError,
    EnsembleError,
    MemberError,
    ModelLoadError,
    RequestError,
    UnsupportedError,
)
from ensemble_server.ensembles.pooling import pool
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.shared import grammar
from ensemble_server.server.engines.shared.reading import RequestReader
from ensemble_server.server.engines.shared.token_checks import check_ids
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.byte_choice import ByteChoice
from ensemble_server.server.engines.transformers_engine.byte_generation import ByteGeneration
from ensemble_server.server.engines.transformers_engine.byte_request import byte_views, check_request, check_spelled
from ensemble_server.server.engines.transformers_engine.byte_visit import ByteVisit
from ensemble_server.server.engines.transformers_engine.choice import LiveChoice
from ensemble_server.server.engines.transformers_engine.family import as_family, check_shared_ids, known_rows
from ensemble_server.server.engines.transformers_engine.generation import Generation
from ensemble_server.server.engines.transformers_engine.job import Job, deliver
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import PrefixCache
from ensemble_server.server.engines.transformers_engine.scheduler import Scheduler, Work
from ensemble_server.server.engines.transformers_engine.visit import Visit, Visitor
from ensemble_server.server.weights.spelled_vocabulary import averaged_over

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then it is not the requests that are at fault


class TransformersEngine:
    """See the module's docstring. `max_batch`: choices that run at once; `max_queue`: requests that may wait.

    `prefix_cache_bytes`: bound of what is kept of prompts that were read, for prompts that begin alike; 0 is off.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        *,
        max_batch: int = 32,
        prefill_chunk: int = 512,
        max_queue: int = 256,
        prefix_cache_bytes: int = 512 * 2**20,
        num_threads: int | None = None,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        self._members = members
        self._families: dict[tuple[str, ...], Sequence[Member]] = {}
        self._averaged_over: dict[tuple[tuple[str, ...], str], AveragedOver] = {}
        self._scheduler = Scheduler(max_batch=max_batch, prefill_chunk=prefill_chunk, max_queue=max_queue)
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._num_threads = num_threads
        self._on_step = on_step
        self._failed_steps = 0
        self._is_stopping = False
        self._failure: str | None = None
        devices = {member.backbone.device for member in members.values()}
        self._devices = ThreadPoolExecutor(len(devices), "device") if len(devices) > 1 else None
        self._reader = RequestReader(always_writes=False)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for asyncio tasks ---------------------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def num_restarts(self) -> int:
        return 0

    @property
    def down(self) -> frozenset[str]:
        return frozenset() if self._failure is None else frozenset(self._members)

    def start(self) -> None:
        """Also builds what structured output needs of every tokenizer: that holds up the whole process, for a second
        where vocabularies are large, so not when the first client asks for it."""
        for member in self._members.values():
            with suppress(UnsupportedError):  # a tokenizer that cannot be followed; requests are told
                grammar.prepared(member.surface.tokenizer, member.vocab_size, member.eos_ids)
        self._thread.start()

    def stop(self) -> None:
        """End all live generations with `EngineDeadError`. Returns when the running step is over."""
        with self._scheduler.changed:
            self._is_stopping = True
            self._failure = self._failure or "the engine was stopped"
            self._scheduler.changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._devices is not None:
            self._devices.shutdown()

    def check(self, mixture: Mixture) -> None:
        if strangers := set(mixture.weights) - set(self._members):
            raise ModelLoadError(f"no hosted member is called {min(strangers)!r}")
        self.averages_over(mixture)

    def averages_over(self, mixture: Mixture) -> AveragedOver:
        key = (tuple(mixture.weights), mixture.vocabulary)
        if key not in self._averaged_over:
            self._averaged_over[key] = averaged_over(mixture, [self._members[name] for name in mixture.weights])
        return self._averaged_over[key]

    def max_model_len(self, mixture: Mixture) -> int:
        return min(self._members[name].max_model_len for name in mixture.weights)

    def _mixed(self, mixture: Mixture) -> Sequence[Member]:
        """The members of a mixture, as they are beside each other. Raises `ModelLoadError` for two vocabularies."""
        names = tuple(mixture.weights)
        if names not in self._families:
            self._families[names] = as_family([self._members[name] for name in names])
        return self._families[names]

    async def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        """See `ensembles.base.MixtureHost`. Raises `OverloadedError` when the queue is full."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        self._scheduler.check_room(request.priority)
        job = await asyncio.to_thread(self._prepare, mixture, request, method, asyncio.get_running_loop())
        self._enqueue(job)
        try:
            while True:
                event = await job.inbox.get()
                if isinstance(event, Exception):
                    raise event
                assert event is not None, "a generation ends with `Done`"
                yield event
                if isinstance(event, Done):
                    return
        finally:
            job.is_cancelled = True

    async def visit_logprobs(
        self, members: Sequence[str], token_ids: Sequence[int], visit: Visitor, *, priority: int = 1
    ) -> None:
        """See `ensembles.base.MixtureHost`. `visit` runs on the engine's thread: no other request gets a token
        meanwhile."""
        mixture = Mixture(dict.fromkeys(members, 1.0))
        self.check(mixture)
        asked = self._mixed(mixture)
        limit = self.max_model_len(mixture)
        if len(token_ids) > limit:
            raise ContextLengthError(
                f"the text has {len(token_ids)} tokens; the context of {', '.join(members)} holds {limit}; "
                "read it in windows"
            )
        check_ids(token_ids, asked[0].vocab_size, "token_ids")
        check_shared_ids(token_ids, asked)
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if len(token_ids) < 2:
            return
        job = Visit(asked, list(token_ids), visit, asyncio.get_running_loop(), priority=priority)
        self._enqueue(job)
        try:
            if isinstance(error := await job.inbox.get(), Exception):
                raise error
        finally:
            job.is_cancelled = True

    async def visit_bytes(self, members: Sequence[str], text: str, visit: Visitor, *, priority: int = 1) -> None:
        """See `ensembles.base.MixtureHost`. `visit` runs on the engine's thread."""
        self.averages_over(Mixture(dict.fromkeys(members, 1.0), vocabulary="bytes"))
        asked = [self._members[name] for name in members]
        token_ids = await asyncio.to_thread(self._read_bytes, asked, text)
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if not text:
            return
        loop = asyncio.get_running_loop()
        job = ByteVisit(asked, token_ids, text.encode(), visit, loop, priority=priority)
        self._enqueue(job)
        try:
            if isinstance(error := await job.inbox.get(), Exception):
                raise error
        finally:
            job.is_cancelled = True

    def _read_bytes(self, members: Sequence[Member], text: str) -> list[list[int]]:
        """The text in every member's own tokens. Raises `ContextLengthError`, and `RequestError` if it is not that."""
        with self._reader.tokenizing:
            token_ids = [member.surface.encode(text) for member in members]
        for member, ids in zip(members, token_ids, strict=True):
            check_spelled(member, ids, text.encode())
            if len(ids) > member.max_model_len:
                raise ContextLengthError(
                    f"the text has {len(ids)} tokens as {member.name!r} reads it; its context holds "
                    f"{member.max_model_len}; read it in windows"
                )
        return token_ids

    def _enqueue(self, job: Job) -> None:
        with self._scheduler.changed:
            if self._is_stopping:
                raise EngineDeadError(self._failure)
            self._scheduler.enqueue(job)

    def _prepare(
        self, mixture: Mixture, request: GenerationRequest, method: str, loop: asyncio.AbstractEventLoop
    ) -> Generation:
        """Read the request in every member's terms and check that it can be served. Runs in a worker thread."""
        if self.averages_over(mixture) == "bytes":
            members = [self._members[name] for name in mixture.weights]
            return self._prepare_bytes(mixture, members, request, method, loop)
        if not mixture.heals:
            raise RequestError(
                "heal is for members that are averaged over text; these are averaged over tokens", param="ensemble.heal"
            )
        members = self._mixed(mixture)
        reading = self._reader.read(request, members, max_model_len=self.max_model_len(mixture))
        structure, first, compiled = request.sampling.grammar, members[0], None
        if structure is not None:
            eos_ids = frozenset().union(*(member.eos_ids for member in members))
            compiled = grammar.compiled(structure, first.surface.tokenizer, first.vocab_size, eos_ids)
        return Generation(
            request,
            mixture,
            members,
            reading,
            method=method,
            grammar=compiled,
            prefixes=self._prefixes,
            loop=loop,
        )

    def _prepare_bytes(
        self,
        mixture: Mixture,
        members: Sequence[Member],
        request: GenerationRequest,
        method: str,
        loop: asyncio.AbstractEventLoop,
    ) -> ByteGeneration:
        """`_prepare` for members that are averaged over text."""
        check_request(request)
        views = byte_views(members, request, heals=mixture.heals, tokenizing=self._reader.tokenizing)
        room = _room(members, [view.token_ids for view in views], request)
        structure, wanted = request.sampling.grammar, request.sampling.max_tokens
        return ByteGeneration(
            request,
            mixture,
            members,
            views,
            method=method,
            max_new_tokens=room if wanted is None else min(wanted, room),
            grammar=None if structure is None else grammar.compiled_by_bytes(structure),
            prefixes=self._prefixes,
            loop=loop,
        )

    # --- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while True:
                with self._scheduler.changed:
                    self._scheduler.changed.wait_for(lambda: self._is_stopping or self._scheduler.has_jobs)
                    if self._is_stopping:
                        break
                self._step()
        except Exception as exc:  # a defect of the engine itself, or a device that is gone
            logger.exception("the engine died")
            self._failure = f"the engine died: {type(exc).__name__}: {exc}"
        self._bury()

    def _bury(self) -> None:
        with self._scheduler.changed:
            self._is_stopping = True
            jobs = self._scheduler.clear()
        for job in jobs:
            job.fail(EngineDeadError(self._failure or "the engine was stopped"))
        deliver(jobs)

    def _step(self) -> None:
        started = time.perf_counter()
        self._scheduler.release()
        for job in self._scheduler.running:
            self._start_choices(job)
        self._scheduler.admit()
        work = self._scheduler.plan()
        if work:
            try:
                results = self._forward(work)
            except Exception as exc:  # out of memory, mostly: the requests of this step fail, the engine lives
                self._fail_step(work, exc)
            else:
                self._failed_steps = 0
                self._advance(work, results)
        duration_s = time.perf_counter() - started
        self._scheduler.observe(work, duration_s)
        jobs = self._scheduler.drop_finished()
        if work and self._on_step is not None:  # before anyone can see the step's results
            self._on_step(self._stats(work, duration_s))
        deliver(jobs)

    def _start_choices(self, job: Job) -> None:
        """Begin as many choices of a request whose prompt is read as there are places, each with its first token."""
        if not isinstance(job, Generation) or job.is_finished or job.is_reading:
            return
        try:
            while job.num_started < job.num_choices and (self._scheduler.has_place_for(job) or not job.live):
                choice = job.start_choice()
                if isinstance(choice, ByteChoice):
                    self._spell(job, choice, [])
                else:
                    self._choose([(job, choice, job.prompt.last_logprobs)])
        except Exception as exc:
            self._fail_job(job, exc)

    def _forward(self, work: Sequence[Work]) -> list[list[torch.Tensor]]:
        """Every backbone runs once, on all its rows; devices run at the same time. -> as `work[i].spans`."""
        rows: dict[torch.device, dict[Backbone, list[tuple[int, int, Span]]]] = {}
        for i, item in enumerate(work):
            for k, (member, span) in enumerate(item.spans):
                of_device = rows.setdefault(member.backbone.device, {})
                of_device.setdefault(member.backbone, []).append((i, k, span))

        results = [[torch.empty(0)] * len(item.spans) for item in work]

        def run_device(device: torch.device) -> None:
            for backbone, placed in rows[device].items():
                logprobs = backbone.forward([span for _, _, span in placed])
                for (i, k, _), result in zip(placed, logprobs, strict=True):
                    results[i][k] = work[i].spans[k][0].widened(result)

        if self._devices is None or len(rows) == 1:
            for device in rows:
                run_device(device)
        else:
            list(self._devices.map(run_device, rows))
        return results

    def _advance(self, work: Sequence[Work], results: Sequence[Sequence[torch.Tensor]]) -> None:
        """Finish prompts, then give every live choice its next token."""
        ready = []
        for item, logprobs in zip(work, results, strict=True):
            if isinstance(item.choice, ByteChoice):
                assert isinstance(item.job, ByteGeneration), "only these write by bytes"
                self._spell(item.job, item.choice, logprobs)
                continue
            if item.choice is not None:
                ready.append((item.job, item.choice, [rows[0] for rows in logprobs]))
                continue
            try:
                item.job.take(logprobs)
            except Exception as exc:
                self._fail_job(item.job, exc)
            self._start_choices(item.job)
        self._choose(ready)

    def _spell(self, job: Generation, choice: ByteChoice, rows: Sequence[torch.Tensor]) -> None:
        """A choice that is written by bytes goes as far as it can with the rows that it wanted."""
        try:
            delta = choice.take(rows) if rows else choice.go_on()
            if delta is not None:
                job.emit(choice, delta)
        except Exception as exc:
            self._fail_job(job, exc)

    @torch.inference_mode()
    def _choose(self, ready: Sequence[tuple[Generation, LiveChoice, Sequence[torch.Tensor]]]) -> None:
        """Pool and sample. Choices with the same pool and number of members are pooled in one go."""
        groups: dict[tuple[PoolName, int, int], list[int]] = {}
        for i, (job, _, logprobs) in enumerate(ready):
            groups.setdefault((job.mixture.pool, len(logprobs), len(logprobs[0])), []).append(i)
        for (name, num_members, _), group in groups.items():
            if num_members == 1:
                pooled = [ready[i][2][0] for i in group]
            else:
                device = ready[group[0]][2][0].device
                stacked = torch.stack(
                    [torch.stack([ready[i][2][k].to(device) for i in group]) for k in range(num_members)]
                )
                weights = np.stack([ready[i][1].weights for i in group], axis=1)
                known = known_rows([ready[i][0].members for i in group], stacked)
                pooled = pool(name, stacked, torch.as_tensor(weights, dtype=torch.float32, device=device), known)
            for i, row in zip(group, pooled, strict=True):
                job, choice, logprobs = ready[i]
                try:
                    _check_finite(job, logprobs, row)
                    job.emit(choice, choice.advance(row, logprobs))
                except Exception as exc:
                    self._fail_job(job, exc)

    def _fail_job(self, job: Job, exc: Exception) -> None:
        if job.is_finished:
            return
        if not isinstance(exc, EnsembleError):
            logger.exception("request %s failed", job.request_id, exc_info=exc)
            exc = MemberError(job.members[0].name, f"generation failed ({type(exc).__name__}: {exc})")
        job.fail(exc)

    def _fail_step(self, work: Sequence[Work], exc: Exception) -> None:
        self._failed_steps += 1
        logger.error("a forward of %d rows failed", sum(len(item.spans) for item in work), exc_info=exc)
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise exc
        for job in {id(item.job): item.job for item in work}.values():
            self._fail_job(job, exc)

    def _stats(self, work: Sequence[Work], duration_s: float) -> StepStats:
        num_rows, num_tokens = Counter(), Counter()
        for item in work:
            for member, span in item.spans:
                num_rows[member.name] += 1
                num_tokens[member.name] += len(span.token_ids)
        return StepStats(
            duration_s,
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_cached_tokens=self._prefixes.drain_hits(),
            prefix_cache_bytes=self._prefixes.num_bytes,
        )


def _room(members: Sequence[Member], prompts: Sequence[Sequence[int]], request: GenerationRequest) -> int:
    """How many tokens fit behind the prompt, whoever reads it. Raises `ContextLengthError` if none does."""
    views = zip(members, prompts, strict=True)
    member, ids = min(views, key=lambda view: view[0].max_model_len - len(view[1]))
    room, length = member.max_model_len - len(ids), len(ids)
    if room < 0 or (room == 0 and request.sampling.max_tokens != 0):
        raise ContextLengthError(
            f"the prompt has {length} tokens as {member.name!r} reads it; its context holds {member.max_model_len}, "
            "prompt and answer together",
            param="messages" if request.messages is not None else "prompt",
        )
    return room


def _check_finite(job: Generation, logprobs: Sequence[torch.Tensor], pooled: torch.Tensor) -> None:
    """Raise `MemberError` if a distribution is no distribution (one NaN logit makes all its log-probabilities NaN)."""
    if pooled[0].isnan():
        culprits = [member for member, row in zip(job.members, logprobs, strict=True) if row[0].isnan()]
        raise MemberError(
            (culprits or job.members)[0].name, "its output is not a number (NaN); its weights may be damaged"
        )
