"""Who may take memory for keys and values, so that all caches together stay below a bound.

What an answer will take is known only at its end; to put aside the longest that it can be would leave most of the
memory unused. So answers grow into it, a block at a time, and a step is taken only if behind it there is still an order
in which all jobs can end, each with what is free and what those before it give back: the banker's algorithm (Dijkstra,
EWD 623, 1977). Whoever would make that impossible waits with its caches; nothing is ever thrown away and read again.

- A job is admitted if its whole prompt fits in that sense; reading never stops for want of memory.
- Background jobs stop at three quarters of the bound, so that interactive ones find some; a single job may have all.
- What could not run even alone is refused at once (`check`).
- Rows that live for one step (branches of lattices) have what nobody else needs in that step (`Spare`). They are not
  put aside: lattices go on without them, only slower (`trunk`).

Not counted: kept prefixes, which have a bound of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import ContextLengthError, ModelLoadError
from ensemble_server.server.engines.transformers_engine.kv_cache import GROWTH, RowCache, Segment, in_blocks
from ensemble_server.server.weights.devices import free_bytes

if TYPE_CHECKING:
    from ensemble_server.server.engines.transformers_engine.job import Job
    from ensemble_server.server.engines.transformers_engine.members import Member

LOOKAHEAD = 16  # tokens that a row may read in a step beyond those it keeps: drafts
BACKGROUND_SHARE = 0.75
FREE_SHARE = 0.8  # of the memory that is free when weights are loaded; the rest is for activations, and everybody else


@dataclass
class Account:
    """One job's bytes. `own`: given back when it ends; `left`: how many it may come to hold besides; `segments`: given
    back when the last who holds them ends."""

    own: int
    left: int
    segments: frozenset[Segment]

    @classmethod
    def of(cls, job: Job) -> Account:
        caches = {id(cache): cache for cache in job.caches} if job.has_begun else {}
        segments = frozenset(segment for cache in caches.values() for segment in cache.shared)
        own = sum(cache.num_bytes for cache in caches.values())
        reserved = job.kv_reserved - sum(segment.num_bytes for segment in segments)
        return cls(max(own, reserved), job.kv_left, segments)


class Spare:
    """Memory that no cache needs in this step, for rows that live no longer."""

    def __init__(self, num_bytes: float = math.inf) -> None:
        self._num_bytes = num_bytes

    def lends(self, num_bytes: int) -> bool:
        """Whether there is as much left; if so it is gone."""
        if num_bytes > self._num_bytes:
            return False
        self._num_bytes -= num_bytes
        return True


class KvBudget:
    """Belongs to the engine's thread, but for `room` and `check`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._accounts: dict[Job, Account] = {}

    def room(self, members: Sequence[Member], num_tokens: Sequence[int], *, read_per_token: int = 1) -> int:
        """How many tokens an answer can have behind prompts of `num_tokens`, one per member, with all memory for it:
        at least 1, if only to be refused by `check`. `read_per_token`: what members read for one, at most."""
        of_prompts = sum(prompt_bytes(member, num) for member, num in zip(members, num_tokens, strict=True))
        of_token = sum(member.backbone.kv_bytes_per_token for member in members)
        room = (self.max_bytes - of_prompts) // max(1, of_token) - LOOKAHEAD - 2 * GROWTH
        return max(1, room // read_per_token)

    def check(self, job: Job) -> None:
        """Raises `ContextLengthError` for a job that could not run even alone."""
        account = Account.of(job)
        if (needed := account.own + account.left) > self.max_bytes:
            names = ", ".join(member.name for member in job.members)
            raise ContextLengthError(
                f"the keys and values of this text, as {names} would keep them, take {needed / 2**20:.1f} MB; "
                f"engine.kv_cache_mb is {self.max_bytes / 2**20:.1f} MB; shorten it, or ask fewer members"
            )

    def check_members(self, members: Iterable[Member]) -> None:
        """Raises `ModelLoadError` for one that could not read a word."""
        for member in members:
            if (needed := prompt_bytes(member, 1) + answer_bytes([member], 1)) > self.max_bytes:
                raise ModelLoadError(
                    f"member {member.name!r} needs {needed / 2**20:.1f} MB for the keys and values of the shortest "
                    f"request; engine.kv_cache_mb is {self.max_bytes / 2**20:.1f} MB; raise it, or free memory"
                )

    def open(self, jobs: Iterable[Job]) -> None:
        """Take stock of all that runs. What is granted afterwards counts until the next time."""
        self._accounts = {job: Account.of(job) for job in jobs if not job.is_finished}

    @property
    def free(self) -> int:
        """Bytes that nobody has, of all that runs."""
        segments = {segment for account in self._accounts.values() for segment in account.segments}
        of_segments = sum(segment.num_bytes for segment in segments)
        return self.max_bytes - of_segments - sum(account.own for account in self._accounts.values())

    def admits(self, job: Job) -> bool:
        """Whether `job` may begin; if so it has its account."""
        account = Account.of(job)
        if not self._is_safe({**self._accounts, job: account}, job):
            return False
        self._accounts[job] = account
        return True

    def grants(self, job: Job, num_bytes: int) -> bool:
        """Whether a running job may take `num_bytes` now, of what it may come to hold; if so they are its own."""
        return not num_bytes or self._allows(job, num_bytes, -num_bytes)

    def promises(self, job: Job, num_bytes: int) -> bool:
        """Whether a running job may come to hold `num_bytes` more than was known."""
        return self._allows(job, 0, num_bytes)

    def _allows(self, job: Job, own: int, left: int) -> bool:
        if (account := self._accounts.get(job)) is None:
            return True
        changed = Account(account.own + own, max(0, account.left + left), account.segments)
        if not self._is_safe({**self._accounts, job: changed}, job):
            return False
        self._accounts[job] = changed
        return True

    def _is_safe(self, accounts: dict[Job, Account], asking: Job) -> bool:
        """Whether all can end, one after the other. Smallest wants first: if any order works, this one does."""
        is_limited = asking.priority > 0 and len(accounts) > 1
        holders = Counter(segment for account in accounts.values() for segment in account.segments)
        free = int(self.max_bytes * (BACKGROUND_SHARE if is_limited else 1))
        free -= sum(account.own for account in accounts.values()) + sum(segment.num_bytes for segment in holders)
        for account in sorted(accounts.values(), key=lambda account: account.left):
            if account.left > free:
                return False
            free += account.own
            for segment in account.segments:
                holders[segment] -= 1
                if not holders[segment]:
                    free += segment.num_bytes
        return True


def default_bytes(devices: Iterable[str], prefix_cache_bytes: int) -> int:
    """For an engine whose weights are loaded: of the device that has least."""
    return max(0, int(FREE_SHARE * (min(map(free_bytes, devices)) - prefix_cache_bytes)))


def prompt_bytes(member: Member, num_tokens: int) -> int:
    """Of a cache with `num_tokens`, a part of which may be shared and stand in a piece of its own."""
    return (in_blocks(num_tokens) + GROWTH) * member.backbone.kv_bytes_per_token


def answer_bytes(members: Sequence[Member], num_tokens: int) -> int:
    """Of the caches of an answer that has not begun."""
    return (in_blocks(num_tokens + LOOKAHEAD) + GROWTH) * sum(member.backbone.kv_bytes_per_token for member in members)


def growth(member: Member, cache: RowCache, num_tokens: int) -> int:
    """By how many bytes a cache grows if it is to hold `num_tokens` more, and what is read ahead."""
    wanted = in_blocks(cache.length - cache.num_shared + num_tokens + LOOKAHEAD)
    return max(0, wanted - cache.capacity) * member.backbone.kv_bytes_per_token
