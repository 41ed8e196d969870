"""Ranking: every member answers, somebody compares the answers, and the best is the reply.

    judge:          score_i = sum over j != i of preference_ij     (see `ensembles.voting.pairwise`)
    cross_encoder:  score_i = the encoder's score of (prompt, answer i)
    neither:        score_i = mean log-probability of answer i's tokens under the member that wrote it (best of n)

When it helps: the comparer tells good from bad better than the members write; a judge need not be able to write the
answer. Cost: members x samples answers, then for m distinct answers m (m - 1) judgements of one token, or m pairs for a
cross-encoder, or nothing. Needs: a judge that gives next-token distributions (a hosted model or a probability average),
or a sentence-transformers CrossEncoder with one score, or members that give log-probabilities. Log-probabilities of
members with different tokenizers are per token of each and hardly compare. A reply streams as one piece, at the end.

What members thought before they answered is neither read by the comparer nor counted (`ensembles.thoughts`). An answer
that calls tools is compared as `name({"argument": value})`; equal calls are equal answers. A
comparison that fails counts as a draw; so do those that the request's deadline cuts off.

Reference: Jiang, Ren & Lin, "LLM-Blender: Ensembling large language models with pairwise ranking and generative
fusion", 2023; Stiennon et al., "Learning to summarize from human feedback", 2020, for best of n.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ensemble_server.ensembles.base import DistributionModel, Done, Event, GenerationRequest, Model, Usage
from ensemble_server.ensembles.candidates import CandidateConfig, candidate_calls, candidates_trace
from ensemble_server.ensembles.errors import DeadlineError, MemberError, ModelLoadError
from ensemble_server.ensembles.fan_out import (
    Answered,
    Call,
    Outcome,
    Silent,
    answered_members,
    check_turnout,
    fan_out,
    total_usage,
)
from ensemble_server.ensembles.method import Method, Services
from ensemble_server.ensembles.text_level import TextLevel, as_delta, timed_choice
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting.consensus import elect, ranked
from ensemble_server.ensembles.voting.pairwise import (
    CRITERION,
    comparison_request,
    mean_logprob,
    place_bias,
    preferences,
    probability_of_first,
)
from ensemble_server.ensembles.voting.tool_calls import said

MEMBERS_SHARE = 0.75  # of a request's deadline, what the answers may take; the rest is for comparing them


@dataclass(frozen=True)
class Comparison:
    """What the comparer made of the candidates: a score for each, and how it came to that, JSON-ready."""

    scores: np.ndarray  # (n,)
    usage: Usage = field(default_factory=Usage)
    trace: Mapping[str, Any] = field(default_factory=dict)


class Ranking(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2306.02561"
    overridable = ("weights", "samples", "temperature", "min_turnout", "criterion")

    class Config(CandidateConfig):
        judge: str | None = Field(
            default=None, description="model that compares answers in pairs, by its next-token distribution"
        )
        cross_encoder: str | None = Field(
            default=None,
            description="sentence-transformers CrossEncoder that scores (prompt, answer): a folder or a hub id",
        )
        criterion: str = Field(default=CRITERION, min_length=1, description="judge only: which answer is ...?")

        @model_validator(mode="after")
        def _one_comparer_and_no_weights(self) -> Ranking.Config:
            if self.judge is not None and self.cross_encoder is not None:
                raise ValueError(
                    "takes a judge or a cross_encoder, not both; without either, members' log-probabilities"
                )
            weighted = [member for member, weight in self.members.items() if weight not in (0, 1)]
            if weighted:
                raise ValueError(f"ranking compares answers and takes no weights but 0 and 1; see {weighted[0]!r}")
            return self

        def references(self) -> set[str]:
            return set(self.members) | ({self.judge} if self.judge is not None else set())

        def num_calls(self, calls: Mapping[str, int]) -> int:
            if self.judge is None:
                return super().num_calls(calls)
            num_candidates = self.samples * sum(1 for weight in self.members.values() if weight)
            return super().num_calls(calls) + num_candidates * (num_candidates - 1) * calls[self.judge]

    config: Config

    def __init__(self, name: str, config: Config, models: Mapping[str, Model], services: Services) -> None:
        super().__init__(name, config, models, services)
        self._reranker = None
        if config.judge is not None:
            judge = models[config.judge]
            if not isinstance(judge, DistributionModel):
                raise ModelLoadError(
                    f"model {name!r}: the judge {config.judge!r} gives text, not next-token distributions; "
                    "take a hosted model or a probability_average"
                )
        elif config.cross_encoder is not None:
            if services.reranker is None:
                raise ModelLoadError(f"model {name!r}: cross-encoders cannot be loaded here; take a judge")
            self._reranker = services.reranker(config.cross_encoder)
        else:
            for member in self.members:
                if isinstance(models[member], Method) and not isinstance(models[member], DistributionModel):
                    raise ModelLoadError(
                        f"model {name!r}: member {member!r} gives no log-probabilities to rank by; set a judge"
                    )

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        started = asyncio.get_running_loop().time()
        outcomes = await self._candidates(config, request)
        candidates = [outcome for outcome in outcomes if outcome.answer is not None]
        left_s = None
        if request.deadline_s is not None:
            left_s = max(0.0, request.deadline_s - (asyncio.get_running_loop().time() - started))
        with timed_choice(request, self.name):
            comparison = await self._compare(candidates, config, request, left_s)
            ranking = ranked(comparison.scores)
        yield as_delta(candidates[ranking.winner].answer.choices[0])
        trace: dict[str, Any] | None = None
        if request.explain:
            trace = candidates_trace(config, request, outcomes)
            trace |= {
                "winner": ranking.winner,
                "scores": ranking.scores.tolist(),
                "margin": ranking.margin,
                "ranking": list(ranking.ranking),
                "ties": [list(group) for group in ranking.ties],
                **comparison.trace,
            }
        yield Done(
            total_usage([*(outcome.usage for outcome in outcomes), comparison.usage]),
            config.method,
            self.members,
            turnout=len(answered_members(outcomes)),
            trace=trace,
        )

    async def _candidates(self, config: Config, request: GenerationRequest) -> list[Outcome]:
        calls = candidate_calls(config, self.models, request)
        is_by_logprob = config.judge is None and self._reranker is None
        if is_by_logprob:
            calls = [_with_logprobs(call) for call in calls]
        limits = [config.member_timeout_s, request.deadline_s and MEMBERS_SHARE * request.deadline_s]
        deadline_s = min((limit for limit in limits if limit is not None), default=None)
        outcomes = await fan_out(calls, ensemble=self.name, min_turnout=config.min_turnout, deadline_s=deadline_s)
        if is_by_logprob:
            outcomes = [_silent_without_logprobs(outcome) for outcome in outcomes]
            check_turnout(calls, outcomes, ensemble=self.name, min_turnout=config.min_turnout)
        return outcomes

    async def _compare(
        self, candidates: Sequence[Answered], config: Config, request: GenerationRequest, left_s: float | None
    ) -> Comparison:
        texts = [said(outcome.answer.choices[0]) for outcome in candidates]
        if config.judge is not None:
            return await compare_by_judge(
                self.models[config.judge],
                request,
                texts,
                ensemble=self.name,
                criterion=config.criterion,
                deadline_s=left_s,
            )
        if self._reranker is not None:
            return Comparison(await self._reranker.score(_question(request), texts))
        return Comparison(np.array([mean_logprob(outcome.answer.choices[0].tokens) for outcome in candidates]))


async def compare_by_judge(
    judge: Model,
    request: GenerationRequest,
    texts: Sequence[str],
    *,
    ensemble: str,
    criterion: str = CRITERION,
    deadline_s: float | None = None,
) -> Comparison:
    """What `judge`, a model that gives next-token distributions, makes of answers to `request`, less their thoughts.

    Every pair of different texts is shown in both orders. A comparison that fails is a draw; if all do, that is the
    error. `ensemble`: the name under which errors are told.
    """
    texts = [without_thoughts(text) for text in texts]
    distinct = list(dict.fromkeys(texts))
    pairs = list(permutations(range(len(distinct)), 2))
    calls = [
        Call(
            judge.name,
            judge,
            comparison_request(request, distinct[first], distinct[second], criterion=criterion),
            sample,
        )
        for sample, (first, second) in enumerate(pairs)
    ]
    try:
        outcomes = await fan_out(calls, ensemble=ensemble, min_turnout=min(1, len(calls)), deadline_s=deadline_s)
    except DeadlineError:
        outcomes = []
    first_wins = {
        pairs[outcome.call.sample]: probability_of_first(outcome.answer.choices[0].tokens[0])
        for outcome in outcomes
        if outcome.answer is not None
    }
    place = [distinct.index(text) for text in texts]
    matrix = preferences(len(distinct), first_wins)[np.ix_(place, place)]
    trace = {
        "preferences": matrix.tolist(),
        "num_judgements": len(first_wins),
        "num_failed_judgements": len(pairs) - len(first_wins),
        "place_bias": place_bias(first_wins),
    }
    return Comparison(elect(matrix).scores, total_usage(outcome.usage for outcome in outcomes), trace)


def _with_logprobs(call: Call) -> Call:
    """What each member of a mixture thinks of its tokens is not asked for: nobody would see it."""
    explain = call.request.explain and not isinstance(call.model, DistributionModel)
    return replace(call, request=replace(call.request, top_logprobs=0, explain=explain))


def _silent_without_logprobs(outcome: Outcome) -> Outcome:
    if outcome.answer is None or mean_logprob(outcome.answer.choices[0].tokens) is not None:
        return outcome
    is_thought = not said(outcome.answer.choices[0]).strip()
    reason = "the answer holds thoughts only" if is_thought else "the answer came without log-probabilities"
    error = MemberError(outcome.call.member, reason)
    return Silent(outcome.call, error, outcome.usage)


def _question(request: GenerationRequest) -> str:
    """What a cross-encoder reads before an answer: the last message of a user, or the prompt."""
    if request.messages is None:
        return str(request.prompt)
    asked = [str(message.get("content") or "") for message in request.messages if message["role"] == "user"]
    return asked[-1] if asked else ""
