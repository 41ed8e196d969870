"""Who waits, who runs, and what of it the next step forwards.

There are two lanes: *interactive* (priority 0 and below), whose users look at a cursor, and *background* (above), whose
users look at a clock. In each the most urgent comes first, then whoever came first.

- A place is a sequence of the batch, `max_batch` of them. Interactive jobs are admitted while interactive ones hold
  fewer; background jobs only into places that nobody holds, but one of them runs in any case.
- When both lanes together have more sequences than places, the youngest of the background pause. What they have read
  and written stays in their KV caches; nothing is computed twice. So there can be twice `max_batch` caches.
- While an interactive prompt is being read, background jobs pause altogether, and otherwise a step holds no more of
  them than `Pace` allows: an arriving request waits for a short step, then has the machine to itself.
- Whatever the interactive load, after `PATIENCE` steps in a row without background work comes one with some: a quarter
  of the places, beside the interactive ones. Background work slows down under load but never stops.
- Memory is a condition besides places (`kv_budget`): for a job to begin, and for a choice to go on into the next block
  of its caches. Interactive ones are asked first.
- Each lane has a queue of `max_queue` of its own: a batch that fills one turns nobody away from the other.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_server.ensembles.errors import OverloadedError
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.byte_generation import ByteGeneration
from ensemble_server.server.engines.transformers_engine.choice import NOTHING, Draft
from ensemble_server.server.engines.transformers_engine.generation import Choice, Generation
from ensemble_server.server.engines.transformers_engine.job import Job
from ensemble_server.server.engines.transformers_engine.kv_budget import KvBudget, Spare
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.pace import Pace
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey

PATIENCE = 8  # steps


@dataclass(frozen=True)
class Work:
    """What one step does for a choice, or for what a job reads (`choice` None): rows of its members. `draft`: what
    members of a choice read, or have read, behind its last token."""

    job: Job
    choice: Choice | None
    spans: Sequence[tuple[Member, Span]]
    draft: Draft = NOTHING

    @property
    def num_tokens(self) -> int:
        return self.draft.num_read + sum(len(span.token_ids) for _, span in self.spans)


class Lane:
    """Jobs of one kind of urgency. `waiting` is guarded by the scheduler's condition, `running` is the engine's."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, int, Job]] = []  # a heap: priority, arrival
        self.running: list[Job] = []

    @property
    def num_places(self) -> int:
        """How many places its jobs hold."""
        return sum(job.num_places for job in self.running if not job.is_finished)

    def leave(self) -> list[Job]:
        """Forget cancelled jobs. Returns those whose deadline has passed while they waited."""
        leaving = [entry for entry in self.waiting if entry[2].is_cancelled or entry[2].is_expired]
        if leaving:
            self.waiting = [entry for entry in self.waiting if entry not in leaving]
            heapq.heapify(self.waiting)
        self.running = [job for job in self.running if not job.is_cancelled]
        return [job for _, _, job in leaving if not job.is_cancelled]


class Scheduler:
    """See the module's docstring. Belongs to the engine's thread, but for `check_room` and `enqueue`."""

    def __init__(self, kv_budget: KvBudget, *, max_batch: int, prefill_chunk: int, max_queue: int) -> None:
        self.changed = threading.Condition()  # someone came
        self._kv_budget = kv_budget
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._max_queue = max_queue
        self._interactive = Lane()
        self._background = Lane()
        self._arrivals = itertools.count()
        self._pace = Pace()
        self._num_paused_steps = 0  # in a row
        self._reading_s: dict[Job, float] = {}  # of interactive jobs: how long the steps took that read for them

    # --- for asyncio tasks ---------------------------------------------------------------------------------------

    def check_room(self, priority: int) -> None:
        """Raise `OverloadedError` if the queue is full."""
        num_waiting = len(self._lane(priority).waiting)
        if num_waiting >= self._max_queue:
            raise OverloadedError(f"{num_waiting} requests are waiting, the queue is full; try again later")

    def enqueue(self, job: Job) -> None:
        """Let `job` wait for its place. `changed` must be held."""
        self.check_room(job.priority)
        heapq.heappush(self._lane(job.priority).waiting, (job.priority, next(self._arrivals), job))
        self.changed.notify()

    # --- the engine's thread -------------------------------------------------------------------------------------

    @property
    def has_jobs(self) -> bool:
        return any(lane.waiting or lane.running for lane in self._lanes)

    @property
    def running(self) -> list[Job]:
        return [*self._interactive.running, *self._background.running]

    @property
    def num_waiting(self) -> int:
        return sum(len(lane.waiting) for lane in self._lanes)

    def release(self) -> None:
        """Forget cancelled jobs, end expired ones with what they have."""
        for lane in self._lanes:
            with self.changed:
                expired = lane.leave()
            lane.running += expired
            for job in lane.running:
                if job.is_expired:
                    job.expire()

    def drop_finished(self) -> list[Job]:
        """Returns all that ran, finished or not."""
        ran = self.running
        for lane in self._lanes:
            lane.running = [job for job in lane.running if not job.is_finished]
        return ran

    def clear(self) -> list[Job]:
        """Forget everything, and return it."""
        with self.changed:
            jobs = [*self.running, *(job for lane in self._lanes for _, _, job in lane.waiting)]
            self._interactive, self._background = Lane(), Lane()
        return jobs

    def has_place_for(self, job: Generation) -> bool:
        """Whether one more choice of `job` may run."""
        if not self._has_place(self._lane(job.priority)):
            return False
        self._kv_budget.open(self.running)
        return self._kv_budget.promises(job, job.kv_of_choice)

    def admit(self) -> None:
        """Begin jobs while there are places and memory for them. While an interactive one lacks memory nobody else gets
        any."""
        self._kv_budget.open(self.running)
        lacks_memory = False
        for lane in self._lanes:
            while self._has_place(lane) or not lane.running:
                with self.changed:
                    if not lane.waiting or lacks_memory:
                        break
                    if lacks_memory := not self._kv_budget.admits(lane.waiting[0][2]):
                        break
                    _, _, job = heapq.heappop(lane.waiting)
                job.admit()
                lane.running.append(job)

    def plan(self) -> list[Work]:
        """What is forwarded in this step: a token of every live choice that does not pause, chunks of what is read."""
        self._kv_budget.open(self.running)
        spare = Spare(self._kv_budget.free - sum(job.kv_next for job in self.running if not job.is_finished))
        being_read: dict[BlockKey, bool] = {}

        def planned(lane: Lane, max_rows: float, max_tokens: float) -> list[Work]:
            return _planned(lane, max_rows, max_tokens, self._prefill_chunk, being_read, self._kv_budget, spare)

        work = planned(self._interactive, math.inf, math.inf)
        num_free = self._max_batch - sum(item.choice is not None for item in work)
        is_its_turn = self._num_paused_steps >= PATIENCE
        if is_its_turn:
            num_free = max(num_free, self._max_batch // 4, 1)
        if is_its_turn or all(item.choice is not None for item in work):
            background = planned(self._background, num_free, self._pace.num_tokens)
        else:
            background = []
        self._num_paused_steps = 0 if background or not self._background.running else self._num_paused_steps + 1
        return work + background or self._beyond_claims()

    def _beyond_claims(self) -> list[Work]:
        """Nobody may go on if all are to be able to end: what lattices claim is an estimate. Of those for whom there is
        memory one goes on that wants least; if there are none, one ends that holds most beyond its claim."""
        jobs = [job for job in self.running if isinstance(job, Generation) and not job.is_finished]
        for job in sorted(jobs, key=lambda job: job.kv_left):
            for choice in job.live:
                if job.kv_step(choice) <= self._kv_budget.free:
                    return [Work(job, choice, job.choice_spans(choice, Spare(0)))]
        by_bytes = [(job, choice) for job in jobs if isinstance(job, ByteGeneration) for choice in job.spelling]
        if by_bytes:
            job, choice = max(by_bytes, key=lambda pair: pair[0].kv_beyond(pair[1]))
            job.emit(choice, choice.cut())
        return []

    def num_spare(self, work: Sequence[Work]) -> float:
        """How many tokens of background work may come on top of the `work` that was planned."""
        return self._pace.num_tokens - sum(item.num_tokens for item in work if item.job.priority > 0)

    def observe(self, work: Sequence[Work], duration_s: float) -> None:
        """A step has done `work`."""
        reading = [item.job for item in work if item.choice is None and item.job.priority <= 0]
        for job in reading:
            self._reading_s[job] = self._reading_s.get(job, 0.0) + duration_s
        for job in [job for job in self._reading_s if job.is_cancelled or job.is_finished or not job.is_reading]:
            if (duration := self._reading_s.pop(job)) and not job.is_cancelled:
                self._pace.observe_reading(duration)
        if not reading:
            self._pace.observe_step(duration_s, sum(item.num_tokens for item in work if item.job.priority > 0))

    @property
    def _lanes(self) -> tuple[Lane, Lane]:
        return self._interactive, self._background

    def _lane(self, priority: int) -> Lane:
        return self._interactive if priority <= 0 else self._background

    def _has_place(self, lane: Lane) -> bool:
        lanes = self._lanes if lane is self._background else (lane,)
        return sum(lane.num_places for lane in lanes) < self._max_batch


def _planned(
    lane: Lane,
    max_rows: float,
    max_tokens: float,
    prefill_chunk: int,
    being_read: dict[BlockKey, bool],
    kv_budget: KvBudget,
    spare: Spare,
) -> list[Work]:
    """One lane's work, its oldest jobs first: at most `max_rows` rows (a choice or a chunk that is read, for all its
    members), about `max_tokens` tokens, of which `prefill_chunk` are read. The first row is not turned away for being
    too large."""
    work: list[Work] = []
    num_left, num_readable = max_tokens, prefill_chunk
    for job in lane.running:
        if job.is_finished:
            continue
        live = [(job, choice) for choice in job.live] if isinstance(job, Generation) else []
        for generation, choice in live:
            if len(work) >= max_rows or num_left < (len(job.members) if work else 1):
                break
            if not kv_budget.grants(generation, generation.kv_step(choice)):
                continue
            work.append(Work(generation, choice, generation.choice_spans(choice, spare)))
            num_left -= work[-1].num_tokens
        if job.is_reading and len(work) < max_rows and min(num_left, num_readable) >= 1:
            item = Work(job, None, job.next_spans(int(min(num_left, num_readable)), being_read, spare))
            if item.num_tokens:
                work.append(item)
            num_left -= item.num_tokens
            num_readable -= item.num_tokens
    return work
