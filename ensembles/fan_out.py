"""Fan-out: several calls to models at the same time, of which some may fail.

A call that fails, stalls past its deadline or comes back empty is *silent*: its outcome holds the error as data, and
`min_turnout` decides whether the answer as a whole goes on without it. Leaving early, by a decision, an error or
because the client went away, cancels every call that still runs, which frees what its model holds.

What stays an exception: anything that is no `EnsembleError`, since that is a fault of ours and not of a member.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import reduce

from ensemble_server.ensembles.base import (
    Answer,
    Choice,
    Delta,
    Done,
    GenerationRequest,
    MemberUsage,
    Model,
    PromptScored,
    Usage,
)
from ensemble_server.ensembles.errors import (
    DeadlineError,
    EngineDeadError,
    EnsembleError,
    MemberError,
    OverloadedError,
    RequestError,
    TurnoutError,
)

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 64  # calls of one fan-out that run at the same time; more would only fill the queues of their models
MAX_CLOSING_S = 1.0  # of a deadline, the time kept to collect what members have when it passes: 5 %, at most this


@dataclass(frozen=True)
class Call:
    """One request to one model. `member` is the name under which it counts; `sample` tells a member's calls apart."""

    member: str
    model: Model
    request: GenerationRequest
    sample: int = 0


@dataclass(frozen=True)
class Answered:
    """A call that ended with an answer. `usage`: what it cost."""

    call: Call
    answer: Answer
    usage: Usage
    error: None = None
    reason: None = None


@dataclass(frozen=True)
class Silent:
    """A call that gave no answer. `usage`: what it cost all the same."""

    call: Call
    error: EnsembleError
    usage: Usage
    answer: None = None

    @property
    def reason(self) -> str:
        """Why there is no answer, in a sentence."""
        return str(self.error)


Outcome = Answered | Silent


async def fan_out(
    calls: Sequence[Call],
    *,
    ensemble: str,
    min_turnout: int = 1,
    deadline_s: float | None = None,
    at_once: int = MAX_AT_ONCE,
) -> list[Outcome]:
    """Run all calls and return their outcomes in the calls' order.

    `min_turnout`: how many different members must answer (at least one of their calls). As soon as that is out of reach
    the other calls are cancelled and `TurnoutError` is raised; or, if every member failed on the same ground and that
    ground is not the member (the request, its deadline, a full queue, a dead engine), the first member's own error.
    `deadline_s`: calls that have not ended by then are cancelled and count as silent. `at_once`: how many may run at
    the same time; the others wait their turn.
    """
    assert min_turnout <= len({call.member for call in calls}), "min_turnout is checked against the members before"
    outcomes: list[Outcome] = []
    async with FanOut(calls, ensemble=ensemble, deadline_s=deadline_s, at_once=at_once) as running:
        async for outcome in running:
            outcomes.append(outcome)
            check_turnout(calls, outcomes, ensemble=ensemble, min_turnout=min_turnout)
    position = {id(call): index for index, call in enumerate(calls)}
    return sorted(outcomes, key=lambda outcome: position[id(outcome.call)])


class FanOut:
    """Calls that run at the same time. Iterate for outcomes as they come; leaving the block cancels what still runs.

    async with FanOut(calls, ensemble=name) as running:
        async for outcome in running:
            if decided(outcome):
                break
    usage = running.usage()

    Plain tasks instead of a task group: a method may yield to its client inside the block, and a task group that is
    suspended across a yield would cancel whoever iterates the method.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        *,
        ensemble: str,
        deadline_s: float | None = None,
        at_once: int = MAX_AT_ONCE,
    ) -> None:
        self._ensemble = ensemble
        self._deadline_s = deadline_s
        self._turns = asyncio.Semaphore(at_once)
        self._progress = [_Progress(call) for call in calls]
        self._tasks: list[asyncio.Task[Outcome]] = []

    async def __aenter__(self) -> FanOut:
        self._tasks = [
            asyncio.create_task(self._run(progress), name=f"{self._ensemble}:{progress.call.member}")
            for progress in self._progress
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[Outcome]:
        pending = set(self._tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=self._tasks.index):  # calls that end together come in their own order
                yield task.result()

    async def in_order(self) -> AsyncIterator[Outcome]:
        """The outcomes in the calls' order instead, so that what is made of them repeats with the calls' seeds."""
        for task in self._tasks:
            yield await task

    def usage(self) -> Usage:
        """What all calls used so far, those that were cancelled included."""
        return total_usage(progress.usage() for progress in self._progress)

    async def _run(self, progress: _Progress) -> Outcome:
        member, watch = progress.call.member, progress.call.request.watch
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            answer = await self._answer(progress)
            if not all(choice.is_blank for choice in answer.choices):
                return Answered(progress.call, answer, progress.usage())
            error: EnsembleError = MemberError(member, "the answer is empty")
        except EnsembleError as exc:
            error = exc
        logger.warning("model %r goes on without member %r: %s", self._ensemble, member, error)
        if watch is not None:
            watch.silent(self._ensemble, member, clock() - began)
        return Silent(progress.call, error, progress.usage())

    async def _answer(self, progress: _Progress) -> Answer:
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._deadline_s) as limit, self._turns:
                ends = limit.when()
                return await progress.collect(None if ends is None else ends - clock())
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise DeadlineError(f"member {progress.call.member!r}: no answer within {self._deadline_s:g} s") from exc


@dataclass
class _Progress:
    """What one call yielded so far, so that its cost is known however it ends."""

    call: Call
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt: PromptScored | None = None
    done: Done | None = None

    async def collect(self, deadline_s: float | None) -> Answer:
        request = self.call.request
        if deadline_s is not None:
            # Told to stop a little earlier, a member that can answer with what it has is heard before it is cut off.
            soft_s = deadline_s - min(MAX_CLOSING_S, 0.05 * deadline_s)
            request = replace(request, deadline_s=min(soft_s, request.deadline_s or soft_s))
        async with aclosing(self.call.model.generate(request)) as events:
            async for event in events:
                match event:
                    case PromptScored():
                        self.prompt = event
                    case Delta(index=index):
                        self.choices.setdefault(index, Choice(index)).extend(event)
                    case Done():
                        self.done = event
        assert self.done is not None, f"model {self.call.model.name!r} ended without Done"
        choices = [self.choices.get(index, Choice(index)) for index in range(request.n)]
        return Answer(tuple(choices), self.done, self.prompt)

    def usage(self) -> Usage:
        """As the model reported it; for a call that broke off, the tokens that were seen to pass."""
        if self.done is None:
            num_read = len(self.prompt.token_ids) if self.prompt else 0
            num_written = sum(len(choice.token_ids) for choice in self.choices.values())
            return Usage(num_read, num_written, {self.call.model.name: MemberUsage(num_read, num_written)})
        usage = self.done.usage
        if usage.members:
            return usage
        return replace(usage, members={self.call.model.name: _alone(usage)})


def _alone(usage: Usage) -> MemberUsage:
    return MemberUsage(usage.prompt_tokens, usage.completion_tokens, reasoning_tokens=usage.reasoning_tokens)


def total_usage(usages: Iterable[Usage]) -> Usage:
    """The sum. Members are summed by name, so that nested ensembles add up to the models that did the work."""
    return reduce(_add_usage, usages, Usage())


def _add_usage(left: Usage, right: Usage) -> Usage:
    members = dict(left.members)
    for name, usage in right.members.items():
        members[name] = members.get(name, MemberUsage()) + usage
    return Usage(
        left.prompt_tokens + right.prompt_tokens,
        left.completion_tokens + right.completion_tokens,
        members,
        left.reasoning_tokens + right.reasoning_tokens,
    )


def answered_members(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """Members of which at least one call was answered, in order of appearance."""
    return tuple(dict.fromkeys(outcome.call.member for outcome in outcomes if outcome.answer is not None))


def silent_members(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Members of which no call was answered, each with the reason of its first call."""
    outcomes = list(outcomes)
    answered = answered_members(outcomes)
    silent: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.call.member not in answered:
            silent.setdefault(outcome.call.member, str(outcome.error))
    return silent


def check_turnout(calls: Sequence[Call], outcomes: Sequence[Outcome], *, ensemble: str, min_turnout: int) -> None:
    """Raise what `fan_out` promises if, after `outcomes`, fewer than `min_turnout` members can still answer."""
    num_calls = Counter(call.member for call in calls)
    num_failed = Counter(outcome.call.member for outcome in outcomes if outcome.error is not None)
    lost = [member for member in num_calls if num_failed[member] == num_calls[member]]
    num_possible = len(num_calls) - len(lost)
    if num_possible >= min_turnout:
        return
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    for ground in (RequestError, OverloadedError, DeadlineError, EngineDeadError):
        if all(isinstance(error, ground) for error in errors):
            raise errors[0]
    silent = {member: reason for member, reason in silent_members(outcomes).items() if member in lost}
    raise TurnoutError(ensemble, silent, answered=len(answered_members(outcomes)), required=min_turnout) from errors[0]
