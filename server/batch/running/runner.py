"""Runs the rows of a job through the models, many at once, and keeps each answer as soon as it is there.

Rows go straight to `hosting.models`: the engine's continuous batching sees them all. Interactive requests go first.
Answers are written in small groups, so that a killed process loses at most the rows that were in flight.

A row is asked with the same seed whenever it is asked, so a job that was interrupted gives the same answers as one that
was not. Some things can still differ between two runs, interrupted or not. Which rows share a step changes the last
bits of a sum: so the last digits of logprobs, if they were asked for, and tokens where two were that close. What an
answer has from a clock or from others: time limits, a remote server's own sampling, the trace of an exchange, and the
usage of calls that an ensemble cancelled on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from ensemble_server.ensembles.errors import EngineDeadError, OverloadedError
from ensemble_server.server.batch.job.identity import seeded
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.running.answering import answer as answer_row
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.running.outages import Outages
from ensemble_server.server.batch.running.room import (
    Room,
    is_out_of_reach,
    is_text_level,
    lacks_members,
    model_name,
    num_sequences,
    sequences_of,
)
from ensemble_server.server.requests.classify import Priors

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import MemberUsage
    from ensemble_server.server.batch.job.store import Counts, JobStore
    from ensemble_server.server.hosting import Hosting

MAX_TRIES = 2  # of a row on which a member failed; remote members have been tried again several times before
MAX_TRIES_OUT_OF_REACH = 20  # of a row whose member nothing gets through to: a quarter of an hour, see `outages`
TRIED_AGAIN = frozenset({"member_failed", "member_timed_out", "turnout_too_low"})
NO_MEMBERS_FAULT = frozenset({"deadline_exceeded", "internal_error"})
GROUP_S = 0.05  # answers that come within this time are written together
TICK_S = 1.0  # the longest silence of `on_progress`
GRACE_S = 10.0  # how long rows may take to end after the deadline, of which they were told when they began
MAYBE_CUT_SHARE = 0.7  # of the time left; ensembles of texts that took more may have lost members (a ranking at 3/4)


@dataclass(frozen=True)
class Progress:
    """Where a run is. `running`: rows in flight. `done`, the tokens (of answers, as OpenAI counts them) and `elapsed_s`
    are of this run, for rates and ETA; `counts` and `members` (what each single model did) are of all the job's runs.
    """

    counts: Counts
    running: int
    done: int
    prompt_tokens: int
    completion_tokens: int
    members: Mapping[str, MemberUsage]
    elapsed_s: float


Ended = Literal["finished", "deadline", "stopped", "failing"]


@dataclass(frozen=True)
class Summary:
    """How a run ended: every row has its result, or the deadline left some without or cut, or it was asked to stop, or
    too many rows failed (`FailureWatch.is_over`).

    The other fields as in `Progress`.
    """

    ended: Ended
    counts: Counts
    prompt_tokens: int
    completion_tokens: int
    members: Mapping[str, MemberUsage]
    elapsed_s: float


class RowBudget(Protocol):
    """Shares out time among the rows of a run."""

    def allowance_s(self, num_left: int) -> float | None:
        """Seconds that the row which begins now may take; None for no limit. `num_left`: rows to begin, it included."""

    def ended(self, allowed_s: float | None, used_s: float) -> None:
        """A row is done that was allowed `allowed_s` and took `used_s`."""


Answer = Callable[..., Awaitable[RowResult]]  # (hosting, row, *, priority, deadline_s), as `answering.answer`


async def run(
    store: JobStore,
    hosting: Hosting,
    *,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    priority: int = 1,
    budget: RowBudget | None = None,
    stop: asyncio.Event | None = None,
    answer: Answer | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    watch: FailureWatch | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Answer every pending row of `store` and record the answers. Errors of a row are results; the run goes on.

    While nothing gets through to the endpoint that a row needs, the row waits and is tried again.

    `concurrency`: rows in flight; by default enough to keep the engine full. `deadline_s`: seconds from now at which
    the run stops: rows in flight then end with the text they have and are kept as `cut`, rows that have none stay
    pending; both run again when the job is continued. `stop`: set it to stop soon; rows in flight stay pending.
    Cancelling the task does the same and raises `CancelledError`. `on_progress` is called after each group of results
    and at least once a second. `watch` sees every row that ends, and ends the run when it is over for it; rows in
    flight stay pending then. `say` is told of waits.

    Raises `EngineDeadError` if the engine died, `StorageError` if results cannot be written, and `ConfigError` if a
    model is not what it was when the job began. What was recorded is kept, and the job can be continued.
    """
    await asyncio.to_thread(_bind_models, store, hosting)
    answer = answer or partial(answer_row, priors=Priors())
    watch = watch or FailureWatch(max_errors=0)
    one = _Run(store, hosting, concurrency, deadline_s, priority, budget, stop, answer, on_progress, watch, say)
    return await one.to_end()


def _bind_models(store: JobStore, hosting: Hosting) -> None:
    names = {hosting.listed[0] if name is None and len(hosting.listed) == 1 else name for name in store.model_names()}
    store.bind_models({name: hosting.fingerprint(name) for name in hosting.models if name in names})


def _is_members_fault(result: RowResult) -> bool:
    return result.status_code >= 500 and result.body["error"]["code"] not in NO_MEMBERS_FAULT


class _Run:
    def __init__(
        self,
        store: JobStore,
        hosting: Hosting,
        concurrency: int | None,
        deadline_s: float | None,
        priority: int,
        budget: RowBudget | None,
        stop: asyncio.Event | None,
        answer: Answer,
        on_progress: Callable[[Progress], None] | None,
        watch: FailureWatch,
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._hosting = hosting
        self._priority = priority
        self._budget = budget
        self._stop = stop or asyncio.Event()
        self._answer = answer
        self._on_progress = on_progress
        self._watch = watch
        self._counts_rows = concurrency is not None
        self._room = Room(num_sequences(hosting) if concurrency is None else concurrency)
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._deadline = None if deadline_s is None else self._began + deadline_s
        self._outages = Outages(self._clock, say)
        self._num_left = 0  # rows to begin
        self._running = 0
        self._done = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._members: Mapping[str, MemberUsage] = {}
        self._answered: list[tuple[int, RowResult]] = []  # not yet recorded
        self._has_news = asyncio.Event()
        self._is_given_up = asyncio.Event()
        self._is_over = False

    async def to_end(self) -> Summary:
        self._num_left = await asyncio.to_thread(self._store.num_to_run)
        self._members = await asyncio.to_thread(self._store.spent)
        self._tell()
        answering = asyncio.create_task(self._answer_all())
        ending = asyncio.create_task(self._asked_to_end())
        giving_up = asyncio.create_task(self._is_given_up.wait())
        keeping = asyncio.create_task(self._keep())
        try:
            await asyncio.wait({answering, ending, giving_up, keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, ending, giving_up):
                task.cancel()
            await asyncio.gather(answering, ending, giving_up, return_exceptions=True)
            self._is_over = True
            self._has_news.set()
            await keeping
        if not answering.cancelled():
            answering.result()
        counts = self._store.counts()
        return Summary(
            self._ended(counts),
            counts,
            self._prompt_tokens,
            self._completion_tokens,
            self._members,
            self._clock() - self._began,
        )

    def _ended(self, counts: Counts) -> Ended:
        if not counts.pending and not counts.cut:
            return "finished"
        if self._stop.is_set():
            return "stopped"
        return "failing" if self._watch.is_over else "deadline"

    # --- answering -----------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as rows:
                async for row in self._rows_to_run():
                    num_places = 1 if self._counts_rows else sequences_of(row, self._hosting)
                    await self._room.take(num_places)
                    if self._is_time_up():
                        return
                    rows.create_task(self._answer_one(row, num_places))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _rows_to_run(self) -> AsyncIterator[Row]:
        after = -1
        while page := await asyncio.to_thread(self._store.pending, after, has_cut=True):
            for row in page:
                yield row
            after = page[-1].index

    async def _answer_one(self, row: Row, num_places: int) -> None:
        self._running += 1
        self._num_left -= 1
        try:
            result = await self._result(seeded(row, self._store.identity.seed))
        finally:
            self._running -= 1
            self._room.give_back(num_places)
        if result is None:
            return
        self._answered.append((row.index, result))
        self._has_news.set()
        if result.is_ok:
            self._watch.answered()
        else:
            self._failed(row, result)

    def _failed(self, row: Row, result: RowResult) -> None:
        self._watch.failed(row.custom_id, result.body)
        if self._watch.is_over:
            self._is_given_up.set()

    async def _result(self, row: Row) -> RowResult | None:
        """What to record for a row; None if it stays pending because the time was over before it had an answer."""
        num_tries = num_tries_out_of_reach = 0
        model = model_name(row, self._hosting)
        while not self._is_time_up():
            if self._hosting.failure is not None:
                raise EngineDeadError(self._hosting.failure)
            if lacks_members(row, self._hosting):
                await asyncio.sleep(TICK_S)
                continue
            was_turn = model in self._outages
            if was_turn and (wait_s := self._outages.wait_s(model)):
                await asyncio.sleep(min(wait_s, TICK_S))
                continue
            began, num_restarts = self._clock(), self._hosting.num_restarts
            left_s = None if self._deadline is None else self._deadline - began
            allowed_s = self._budget.allowance_s(self._num_left + 1) if self._budget else None
            limits = [limit for limit in (left_s, allowed_s) if limit is not None]
            try:
                result = await self._answer(
                    self._hosting, row, priority=self._priority, deadline_s=min(limits, default=None)
                )
            except OverloadedError as exc:
                self._outages.over(model)
                await asyncio.sleep(exc.retry_after_s)
                continue
            if _is_members_fault(result) and is_out_of_reach(row, self._hosting):
                num_tries_out_of_reach += self._wait_for(model, row, result, was_turn=was_turn)
                if num_tries_out_of_reach < MAX_TRIES_OUT_OF_REACH:
                    continue
                return result
            self._outages.over(model)
            if self._hosting.failure is not None:  # an ensemble may have taken dead members for silent ones
                raise EngineDeadError(self._hosting.failure)
            has_restarted = self._hosting.num_restarts != num_restarts and is_text_level(row, self._hosting)
            if has_restarted or lacks_members(row, self._hosting):
                if not self._is_time_up():
                    continue
                return replace(result, is_cut=True) if result.is_ok else None
            used_s = self._clock() - began
            if self._budget is not None:
                self._budget.ended(allowed_s, used_s)
            num_tries += 1
            if num_tries < MAX_TRIES and not result.is_ok and result.body["error"]["code"] in TRIED_AGAIN:
                continue
            if left_s is None or (allowed_s is not None and allowed_s < left_s):
                return replace(result, is_cut=False)  # by its own limit, which another try would meet again
            is_late = used_s >= MAYBE_CUT_SHARE * left_s
            if result.is_ok:
                return replace(result, is_cut=result.is_cut or (is_late and is_text_level(row, self._hosting)))
            return None if is_late else result
        return None

    def _wait_for(self, model: str, row: Row, result: RowResult, *, was_turn: bool) -> bool:
        """Begin or lengthen the outage of the row's model. Returns whether the row was the one that tried.

        As long as nothing was answered, tries count as failures: an address that is wrong never answers.
        """
        is_try = self._outages.failed(model, result.body["error"]["message"], was_turn=was_turn)
        if is_try and not self._watch.num_ok:
            self._failed(row, result)
        return is_try

    # --- keeping -------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Record answers as they come, in groups, until the run is over and all are recorded."""
        while not (self._is_over and not self._answered):
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._has_news.wait()
            self._has_news.clear()
            if not self._is_over:
                await asyncio.sleep(GROUP_S)
            group, self._answered = self._answered, []
            if group:
                self._members = await asyncio.to_thread(self._record, group)
                self._count(group)
            self._tell()

    def _record(self, group: list[tuple[int, RowResult]]) -> Mapping[str, MemberUsage]:
        self._store.record(group)
        return self._store.spent()

    def _count(self, group: list[tuple[int, RowResult]]) -> None:
        self._done += len(group)
        for _, result in group:
            usage = result.body.get("usage", {})
            self._prompt_tokens += usage.get("prompt_tokens", 0)
            self._completion_tokens += usage.get("completion_tokens", 0)

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    self._store.counts(),
                    self._running,
                    self._done,
                    self._prompt_tokens,
                    self._completion_tokens,
                    self._members,
                    self._clock() - self._began,
                )
            )

    # --- ending --------------------------------------------------------------------------------------------------

    def _is_time_up(self) -> bool:
        return self._deadline is not None and self._clock() >= self._deadline

    async def _asked_to_end(self) -> None:
        """Returns when rows in flight are to be given up."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(None if self._deadline is None else self._deadline + GRACE_S):
                await self._stop.wait()
