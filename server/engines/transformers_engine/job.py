"""What the engine's loop needs to know of a piece of work, and how its events reach whoever awaits them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from ensemble_server.ensembles.base import Event
from ensemble_server.ensembles.errors import DeadlineError
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey


class Job(ABC):
    """Work for one or more members, from the queue to its last event. Two kinds: a `Generation`, a `Visit`.

    Belongs to the engine's thread, but for `inbox` and `is_cancelled`. `deadline_s`: seconds from now.
    """

    def __init__(
        self,
        members: Sequence[Member],
        loop: asyncio.AbstractEventLoop,
        *,
        priority: int,
        deadline_s: float | None = None,
        request_id: str = "",
    ) -> None:
        self.members = members
        self.loop = loop
        self.priority = priority
        self.request_id = request_id
        self.deadline_s = deadline_s
        self.is_cancelled = False
        self.is_finished = False
        self.has_begun = False
        self.inbox: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self.outbox: list[Event | Exception | None] = []
        self.waited_s = 0.0  # for its place, once it has begun
        self._arrived = time.monotonic()
        self._deadline = None if deadline_s is None else time.monotonic() + deadline_s

    @property
    def is_expired(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    @property
    @abstractmethod
    def num_places(self) -> int:
        """How many of the engine's places it holds while it runs."""

    @property
    @abstractmethod
    def is_reading(self) -> bool:
        """Whether there are tokens of its own, not generated ones, that its members have yet to read."""

    @property
    @abstractmethod
    def caches(self) -> Iterator[RowCache]:
        """All that its members remember for it, once it has begun. One may come twice."""

    @property
    @abstractmethod
    def kv_reserved(self) -> int:
        """Bytes that its caches, own and shared, will take when all is read that is being read; 0 behind that."""

    @property
    @abstractmethod
    def kv_left(self) -> int:
        """Bytes that its caches may come to take besides those that they have, or that are reserved."""

    @property
    def kv_next(self) -> int:
        """Bytes by which its caches grow in the next step, at most, besides what is reserved."""
        return 0

    def admit(self) -> None:
        """It has got its place."""
        self.waited_s = time.monotonic() - self._arrived
        self.begin()
        self.has_begun = True

    @abstractmethod
    def begin(self) -> None:
        """It has been admitted."""

    @abstractmethod
    def next_spans(self, budget: int, being_read: dict[BlockKey, bool], spare: Spare) -> list[tuple[Member, Span]]:
        """What its members read next, together about `budget` tokens: nothing where one has read all, or waits for what
        another job is going to read. `being_read`: see `prompt.Prompt.next_spans`; `spare`: for rows of this step."""

    @abstractmethod
    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """Results of the spans just forwarded, in their order: (num_keep, V) each."""

    def expire(self) -> None:
        """Its deadline has passed."""
        self.fail(DeadlineError(f"no token was generated within {self.deadline_s:g} s"))

    def fail(self, error: Exception) -> None:
        self.outbox.append(error)
        self.is_finished = True


def deliver(jobs: Sequence[Job]) -> None:
    """Hand each job's outbox to whoever awaits it: one wake-up per event loop and step, not one per event."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Event | Exception | None]]]] = {}
    for job in jobs:
        if job.outbox:
            by_loop.setdefault(job.loop, []).append((job, job.outbox))
            job.outbox = []
    for loop, batches in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_fill_inboxes, batches)


def _fill_inboxes(batches: Sequence[tuple[Job, Sequence[Event | Exception | None]]]) -> None:
    for job, events in batches:
        for event in events:
            job.inbox.put_nowait(event)
