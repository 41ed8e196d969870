"""Majority (self-consistency): every member answers several times, and the answer given most often is the reply.

    winner = argmax over answers a of  sum over samples s that answer a of  w_member(s)

When it helps: questions with one short right answer that is reached by reasoning; errors scatter, the right answer does
not. Cost: members x samples answers per reply, less those that early stopping saves: as soon as the samples that still
run cannot change the winner, they are cancelled. Needs: any models; samples that differ (a temperature above 0), and
answers that can be found in the text (`ensembles.voting.answer_extraction`). A reply streams as one piece, at the end.

The reply is the first text that gives the winning answer. Tool calls are answers like any other: equal calls
(`ensembles.voting.tool_calls`) are one answer, and a text is another. With a seed the samples are counted in their own
order, so that the same text repeats; without one as they arrive, which saves more. If no sample gives an answer, the
first is the reply.

Related: crowd_vote, for answers that cannot be compared as values.

Reference: Wang et al., "Self-consistency improves chain of thought reasoning in language models", 2023.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from pydantic import Field

from ensemble_server.ensembles.base import Done, Event, GenerationRequest, Usage
from ensemble_server.ensembles.candidates import CandidateConfig, candidate_calls, candidates_trace
from ensemble_server.ensembles.fan_out import Call, FanOut, Outcome, answered_members, check_turnout
from ensemble_server.ensembles.text_level import TextLevel, as_delta, timed_choice
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.majority import PENDING, Vote, agreement, is_decided, plurality, tally
from ensemble_server.ensembles.voting.tool_calls import called


class Majority(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2203.11171"
    overridable = ("weights", "samples", "answer", "early_stop", "temperature", "min_turnout")

    class Config(CandidateConfig):
        samples: int = Field(default=5, ge=1, le=64, description="answers of each member")
        answer: AnswerKind = Field(default="text", description="what is counted: number | choice | yes_no | text")
        early_stop: bool = Field(default=True, description="cancel the samples that cannot change the winner any more")

    config: Config

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        calls = candidate_calls(config, self.models, request)
        outcomes, usage = await self._gather(calls, config, request)
        with timed_choice(request, self.name):
            votes = [_vote(outcome, config) for outcome in outcomes]
            weights = [config.members[outcome.call.member] for outcome in outcomes]
            winner = plurality(votes, weights)
        elected = next(
            outcome
            for outcome, vote in zip(outcomes, votes, strict=True)
            if outcome.answer is not None and vote == winner
        )
        yield as_delta(elected.answer.choices[0])
        trace: dict[str, Any] | None = None
        if request.explain:
            trace = candidates_trace(config, request, outcomes)
            answers = [vote for outcome, vote in zip(outcomes, votes, strict=True) if outcome.answer is not None]
            for candidate, answer in zip(trace["candidates"], answers, strict=True):
                candidate["answer"] = answer
            sums = tally(votes, weights)
            trace |= {
                "answer": winner,
                "votes": sums,
                "agreement": agreement(sums),
                "samples_saved": len(calls) - len(outcomes),
            }
        yield Done(usage, config.method, self.members, turnout=len(answered_members(outcomes)), trace=trace)

    async def _gather(
        self, calls: list[Call], config: Config, request: GenerationRequest
    ) -> tuple[list[Outcome], Usage]:
        """The outcomes that were waited for, in the calls' order, and what all calls used."""
        weights = [config.members[call.member] for call in calls]
        votes: list[Vote] = [PENDING] * len(calls)
        place = {id(call): index for index, call in enumerate(calls)}
        outcomes: list[Outcome] = []
        async with FanOut(calls, ensemble=self.name, deadline_s=config.deadline_s(request)) as running:
            async for outcome in aiter(running) if request.sampling.seed is None else running.in_order():
                outcomes.append(outcome)
                votes[place[id(outcome.call)]] = _vote(outcome, config)
                check_turnout(calls, outcomes, ensemble=self.name, min_turnout=config.min_turnout)
                has_turnout = len(answered_members(outcomes)) >= config.min_turnout
                if config.early_stop and has_turnout and is_decided(votes, weights):
                    break
        return sorted(outcomes, key=lambda outcome: place[id(outcome.call)]), running.usage()


def _vote(outcome: Outcome, config: Majority.Config) -> str | None:
    """The answer that was given; None for a silent call and for a text without an answer."""
    if outcome.answer is None:
        return None
    return called(outcome.answer.choices[0]) or extract(outcome.answer.text, config.answer)
