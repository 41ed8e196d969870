"""The engine's thread: requests join and leave between steps; one step is

    admit → plan: one token of every live choice, a chunk of the prompts → draft: what may come behind the token
    → forward each member on its rows → pool → sample once, and on while what comes is what was drafted
    → tell every member (its row grows by the last token in the next step)

It looks for cancelled and expired requests between two steps, so hanging up costs one step. Asyncio tasks reach it
through `enqueue` and `stop`, and hear from it through the jobs' inboxes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from ensemble_server.ensembles.base import PoolName
from ensemble_server.ensembles.errors import EngineDeadError, EnsembleError, MemberError
from ensemble_server.ensembles.pooling import pool
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.byte_choice import ByteChoice
from ensemble_server.server.engines.transformers_engine.byte_generation import ByteGeneration
from ensemble_server.server.engines.transformers_engine.choice import LiveChoice
from ensemble_server.server.engines.transformers_engine.family import known_rows
from ensemble_server.server.engines.transformers_engine.generation import Generation
from ensemble_server.server.engines.transformers_engine.job import Job, deliver
from ensemble_server.server.engines.transformers_engine.kv_cache import held_bytes
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import PrefixCache
from ensemble_server.server.engines.transformers_engine.scheduler import Scheduler, Work
from ensemble_server.server.engines.transformers_engine.spare_time import SpareTime
from ensemble_server.server.engines.transformers_engine.speculation import Speculation

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then it is not the requests that are at fault


class StepLoop:
    """See the module's docstring. `devices`: where the members are; those of several run at the same time.
    `speculation`: who says what choices read ahead.

    `failure`: why nothing runs any more, for people; None while it does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        devices: frozenset[torch.device],
        spare_time: SpareTime,
        *,
        speculation: Speculation,
        num_threads: int | None,
        on_step: Callable[[StepStats], None] | None,
    ) -> None:
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._speculation = speculation
        self._spare_time = spare_time
        self._num_threads = num_threads
        self._on_step = on_step
        self._num_failed_steps = 0
        self._is_stopping = False
        self.failure: str | None = None
        self._devices = ThreadPoolExecutor(len(devices), "device") if len(devices) > 1 else None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all jobs with `EngineDeadError`. Returns when the running step is over."""
        with self._scheduler.changed:
            self._is_stopping = True
            self.failure = self.failure or "the engine was stopped"
            self._scheduler.changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._devices is not None:
            self._devices.shutdown()

    def check_alive(self) -> None:
        """Raises `EngineDeadError` if nothing runs any more."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def enqueue(self, job: Job) -> None:
        """Raises `EngineDeadError` and, when the job's lane is full, `OverloadedError`."""
        with self._scheduler.changed:
            if self._is_stopping:
                raise EngineDeadError(self.failure)
            self._scheduler.enqueue(job)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            while True:
                with self._scheduler.changed:
                    self._scheduler.changed.wait_for(
                        lambda: self._is_stopping or self._scheduler.has_jobs or self._spare_time.has_work
                    )
                    if self._is_stopping:
                        break
                    is_idle = not self._scheduler.has_jobs
                if is_idle:
                    self._spare_time.work()
                else:
                    self._step()
        except Exception as exc:  # a defect of the engine itself, or a device that is gone
            logger.exception("the engine died")
            self.failure = f"the engine died: {type(exc).__name__}: {exc}"
        self._bury()

    def _bury(self) -> None:
        with self._scheduler.changed:
            self._is_stopping = True
            jobs = self._scheduler.clear()
        for job in jobs:
            job.fail(EngineDeadError(self.failure or "the engine was stopped"))
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
                work = self._speculation.drafted(work, self._scheduler.num_spare(work), self._forward)
                results = self._forward(work)
                work, results = self._with_late(work, results)
            except Exception as exc:  # out of memory, mostly: the requests of this step fail, the engine lives
                self._fail_step(work, exc)
            else:
                self._num_failed_steps = 0
                self._advance(work, results)
        duration_s = time.perf_counter() - started
        self._scheduler.observe(work, duration_s)
        jobs = self._scheduler.drop_finished()
        if work and self._on_step is not None:  # before anyone can see the step's results
            self._on_step(self._stats(work, duration_s))
        deliver(jobs)
        self._spare_time.after_step(sum(item.num_tokens for item in work), duration_s)

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
                logprobs = self._timed_forward(backbone, [span for _, _, span in placed])
                for (i, k, _), result in zip(placed, logprobs, strict=True):
                    results[i][k] = work[i].spans[k][0].widened(result)

        if self._devices is None or len(rows) == 1:
            for device in rows:
                run_device(device)
        else:
            list(self._devices.map(run_device, rows))
        return results

    def _with_late(
        self, work: Sequence[Work], results: list[list[torch.Tensor]]
    ) -> tuple[Sequence[Work], list[list[torch.Tensor]]]:
        """Members that lag behind read up to the main one where they are asked: in a forward of their own, since that
        is known only now. -> work and results with theirs."""
        late = {
            i: replace(item, spans=spans)
            for i, item in enumerate(work)
            if isinstance(item.choice, LiveChoice) and (spans := item.choice.late_spans(results[i]))
        }
        if not late:
            return work, results
        read = dict(zip(late, self._forward(list(late.values())), strict=True))
        together = [
            replace(item, spans=[*item.spans, *late[i].spans]) if i in late else item for i, item in enumerate(work)
        ]
        return together, [[*rows, *read.get(i, ())] for i, rows in enumerate(results)]

    def _timed_forward(self, backbone: Backbone, spans: Sequence[Span]) -> list[torch.Tensor]:
        if not self._speculation.is_in_use:
            return backbone.forward(spans)
        started = time.perf_counter()
        logprobs = backbone.forward(spans)
        if backbone.device.type != "cpu":
            torch.accelerator.synchronize(backbone.device)  # the step does so when it samples, a moment later
        self._speculation.observe(backbone, sum(len(span.token_ids) for span in spans), time.perf_counter() - started)
        return logprobs

    def _advance(self, work: Sequence[Work], results: Sequence[Sequence[torch.Tensor]]) -> None:
        """Finish prompts, then give every live choice its next tokens: one, and one for every drafted one that is
        right."""
        ready = []
        for item, logprobs in zip(work, results, strict=True):
            if isinstance(item.choice, ByteChoice):
                assert isinstance(item.job, ByteGeneration), "only these write by bytes"
                self._spell(item.job, item.choice, logprobs)
                continue
            if item.choice is not None:
                ready.append((item, item.choice, item.choice.distributions(item.draft, logprobs)))
                continue
            try:
                item.job.take(logprobs)
            except Exception as exc:
                self._fail_job(item.job, exc)
            self._start_choices(item.job)
        for place in itertools.count():
            self._choose([(item.job, choice, [rows[place] for rows in logprobs]) for item, choice, logprobs in ready])
            going_on = []
            for item, choice, logprobs in ready:
                is_over = item.job.is_finished or choice.finish_reason is not None
                draft = item.draft.token_ids
                if not is_over and place < len(draft) and choice.last_token == draft[place]:
                    going_on.append((item, choice, logprobs))
                    continue
                self._speculation.count(choice, item.draft, place)
                if not is_over:
                    choice.unread(len(draft) - place)
            if not (ready := going_on):
                break

    def _spell(self, job: Generation, choice: ByteChoice, rows: Sequence[torch.Tensor]) -> None:
        """A choice that is written by bytes goes as far as it can with the rows that it wanted."""
        try:
            delta = choice.take(rows) if rows else choice.go_on()
            if delta is not None:
                job.emit(choice, delta)
        except Exception as exc:
            self._fail_job(job, exc)

    @torch.inference_mode()
    def _choose(self, ready: Sequence[tuple[Generation, LiveChoice, Sequence[torch.Tensor | None]]]) -> None:
        """Pool and sample. Choices with the same pool and number of members are pooled in one go."""
        groups: dict[tuple[PoolName, int, int], list[int]] = {}
        voters = [choice.voters(expected) for _, choice, expected in ready]
        rows = [[_known(ready[i][2][k]) for k in asked] for i, asked in enumerate(voters)]
        for i, (job, _, _) in enumerate(ready):
            groups.setdefault((job.mixture.pool, len(rows[i]), len(rows[i][0])), []).append(i)
        for (name, num_members, _), group in groups.items():
            if num_members == 1:
                pooled = [rows[i][0] for i in group]
            else:
                device = rows[group[0]][0].device
                stacked = torch.stack([torch.stack([rows[i][k].to(device) for i in group]) for k in range(num_members)])
                weights = np.stack([ready[i][1].pool_weights(rows[i]) for i in group], axis=1)
                known = known_rows([ready[i][0].members for i in group], stacked)
                pooled = pool(name, stacked, torch.as_tensor(weights, dtype=torch.float32, device=device), known)
            for i, row in zip(group, pooled, strict=True):
                job, choice, expected = ready[i]
                try:
                    _check_finite([choice.members[k] for k in voters[i]], rows[i], row)
                    job.emit(choice, choice.advance(row, expected, voters[i]))
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
        self._num_failed_steps += 1
        logger.error("a forward of %d rows failed", sum(len(item.spans) for item in work), exc_info=exc)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise exc
        for job in {id(item.job): item.job for item in work}.values():
            self._fail_job(job, exc)

    def _stats(self, work: Sequence[Work], duration_s: float) -> StepStats:
        num_rows, num_tokens = Counter(), Counter()
        drafted, accepted = self._speculation.drain_counts()
        for item in work:
            for member, span in item.spans:
                num_rows[member.name] += 1
                num_tokens[member.name] += len(span.token_ids)
            if item.choice is not None and item.draft.drafter is not None:
                drafter = item.choice.members[item.draft.drafter].name
                num_rows[drafter] += not item.draft.unread
                num_tokens[drafter] += item.draft.num_read
        return StepStats(
            duration_s,
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_cached_tokens=self._prefixes.drain_hits(),
            prefix_cache_bytes=self._prefixes.num_bytes,
            num_restarts=_drained_restarts(work),
            kv_cache_bytes=held_bytes(
                itertools.chain(
                    (cache for job in self._scheduler.running for cache in job.caches),
                    (span.cache for item in work for _, span in item.spans),  # branches, and what has ended
                )
            ),
            num_drafted=drafted,
            num_accepted=accepted,
        )


def _drained_restarts(work: Sequence[Work]) -> Counter[str]:
    """How often members that are averaged over text began it anew, since these jobs were asked last."""
    restarts: Counter[str] = Counter()
    for job in {id(item.job): item.job for item in work}.values():
        if isinstance(job, ByteGeneration):
            restarts.update(job.drain_restarts())
    return restarts


def _known(row: torch.Tensor | None) -> torch.Tensor:
    assert row is not None, "members that are asked have read the text"
    return row


def _check_finite(members: Sequence[Member], logprobs: Sequence[torch.Tensor], pooled: torch.Tensor) -> None:
    """Raise `MemberError` if a distribution is no distribution (one NaN logit makes all its log-probabilities NaN)."""
    if pooled[0].isnan():
        culprits = [member for member, row in zip(members, logprobs, strict=True) if row[0].isnan()]
        raise MemberError((culprits or members)[0].name, "its output is not a number (NaN); its weights may be damaged")
