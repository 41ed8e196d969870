"""Answer fusion: several models propose, one model reads the proposals and writes the reply.

    layer 1: every member answers the request
    layer l: every member answers it again, having read the proposals of layer l - 1, numbered
    reply:   the aggregator, having read the proposals of the last layer, or their `top_k` best

When it helps: open answers whose parts come from different members, with an aggregator at least as good as they are;
a weak one copies a proposal or loses the thread. Cost: members x samples x layers calls and one of the aggregator,
which reads all proposals. Only the aggregator streams, so the first token comes after the slowest proposer. Needs: any
models. Several choices (n) are written by the aggregator from the same proposals.

What members thought before they answered is not passed on (`ensembles.thoughts`). Proposals that call tools are passed
on as `name({"argument": value})`; whether to call is the aggregator's decision, which has the tools as well.

Related: crowd_vote, which picks a proposal and writes nothing; exchange_of_thought, where all read each other.

References: Wang et al., "Mixture-of-Agents", 2024, https://arxiv.org/abs/2406.04692 (layers);
Jiang et al., "LLM-Blender", 2023, https://arxiv.org/abs/2306.02561 (rank first, then fuse the best).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, Model
from ensemble_server.ensembles.candidates import CandidateConfig, candidate_calls, candidates_trace
from ensemble_server.ensembles.crowd_vote import SIMILARITY_NEEDS, hold_vote
from ensemble_server.ensembles.errors import DeadlineError
from ensemble_server.ensembles.fan_out import Outcome, answered_members, fan_out, total_usage
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.text_level import EmbeddingNeed, TextLevel
from ensemble_server.ensembles.voting.similarity import SimilarityBlend
from ensemble_server.ensembles.voting.tool_calls import called, said

INSTRUCTION = (
    "Several answers to the request were proposed independently; they are numbered here. They may be wrong, incomplete"
    " or contradict each other. Judge them critically, keep what is right, correct what is not, and write one answer"
    " that is better than each of them. Write only that answer, without mentioning the proposals."
)

ABOUT_CALLS = (
    "Proposals written as name(arguments) call that function. If a function is to be called now, call it yourself; a"
    " description of the call is no answer."
)


def fused(
    request: GenerationRequest, proposals: Sequence[str], instruction: str, *, have_calls: bool = False
) -> GenerationRequest:
    """`request` with the numbered proposals in it: after the last message of its user, or before a raw prompt.

    Blank ones are left out; without any, the request stays as it is. `have_calls`: whether some of them call tools.
    """
    instruction = f"{instruction} {ABOUT_CALLS}" if have_calls else instruction
    proposals = [text for text in proposals if text.strip()]
    if not proposals:
        return request
    numbered = "\n\n".join(f"{number}. {text.strip()}" for number, text in enumerate(proposals, start=1))
    reading = f"{instruction}\n\n{numbered}"
    if request.messages is None:
        return replace(request, prompt=f"{reading}\n\n{request.prompt}")
    *before, last = request.messages
    if last["role"] != "user":
        return replace(request, messages=(*request.messages, {"role": "user", "content": reading}))
    content = last["content"]
    if isinstance(content, str):
        content = f"{content}\n\n{reading}"
    else:
        content = [*content, {"type": "text", "text": f"\n\n{reading}"}]
    return replace(request, messages=(*before, {**last, "content": content}))


@dataclass(frozen=True)
class _Layer:
    """What was proposed in a layer, and `report`: how it was ranked, if it was."""

    outcomes: Sequence[Outcome]
    proposals: Sequence[str]
    have_calls: bool
    report: Mapping[str, Any] | None


class AnswerFusion(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2406.04692"
    overridable = ("weights", "samples", "layers", "top_k", "similarity", "temperature", "min_turnout")
    writes_choices = True  # the aggregator writes them all, from the same proposals
    gives_logprobs = True  # the text is the aggregator's, and so are its logprobs, if it has any

    class Config(CandidateConfig):
        aggregator: str = Field(description="name of the model that reads the proposals and writes the reply")
        layers: int = Field(default=1, ge=1, le=3, description="rounds of proposals before the aggregator")
        top_k: int | None = Field(
            default=None,
            ge=1,
            description="proposals that are passed on, best first by a crowd vote; null: all, unranked",
        )
        similarity: SimilarityBlend = Field(
            default={"rouge_l_word": 1.0}, description="of the crowd vote that top_k goes by"
        )
        instruction: str = Field(
            default=INSTRUCTION, min_length=1, description="what is told to those who read proposals"
        )

        def references(self) -> set[str]:
            return super().references() | {self.aggregator}

        def num_calls(self, calls: Mapping[str, int]) -> int:
            return self.layers * super().num_calls(calls) + calls[self.aggregator]

        def embedding_need(self) -> EmbeddingNeed | None:
            is_used = self.top_k is not None and "embedding" in self.similarity
            return SIMILARITY_NEEDS if is_used else None

    config: Config

    def __init__(self, name: str, config: Config, models: Mapping[str, Model], services: Services) -> None:
        super().__init__(name, config, models, services)
        self.members = tuple(dict.fromkeys((*self.members, config.aggregator)))
        limits = [models[member].max_model_len for member in self.members]
        self.max_model_len = min((limit for limit in limits if limit is not None), default=None)

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        clock = asyncio.get_running_loop().time
        ends = None if request.deadline_s is None else clock() + request.deadline_s

        layers: list[_Layer] = []
        for number in range(config.layers):
            # What time is left is shared equally among the layers to come and the aggregator.
            left_s = None if ends is None else (ends - clock()) / (config.layers - number + 1)
            asked = replace(request, top_logprobs=None)
            if layers:
                asked = self._fused(asked, layers[-1], config)
            layers.append(await self._propose(config, replace(asked, deadline_s=left_s)))

        asked = replace(self._fused(request, layers[-1], config), overrides={})
        if ends is not None:
            left_s = ends - clock()
            asked = replace(asked, deadline_s=left_s)
            if left_s <= 0:
                raise DeadlineError(f"model {self.name!r}: no time was left for the aggregator {config.aggregator!r}")
        done: Done | None = None
        async with aclosing(self.models[config.aggregator].generate(asked)) as events:
            async for event in events:
                match event:
                    case Delta():
                        yield event
                    case Done():
                        done = event
        assert done is not None, f"model {config.aggregator!r} ended without Done"
        answered = {*answered_members(layers[-1].outcomes), config.aggregator}
        yield Done(
            total_usage([*(outcome.usage for layer in layers for outcome in layer.outcomes), done.usage]),
            config.method,
            self.members,
            turnout=len(answered),
            trace=self._trace(config, request, layers, done) if request.explain else None,
        )

    def _fused(self, request: GenerationRequest, layer: _Layer, config: Config) -> GenerationRequest:
        return fused(request, layer.proposals, config.instruction, have_calls=layer.have_calls)

    async def _propose(self, config: Config, request: GenerationRequest) -> _Layer:
        """One layer: what the members answer to `request`, ranked and cut if so configured."""
        outcomes = await fan_out(
            candidate_calls(config, self.models, request),
            ensemble=self.name,
            min_turnout=config.min_turnout,
            deadline_s=config.deadline_s(request),
        )
        candidates = [outcome for outcome in outcomes if outcome.answer is not None]
        choices = [outcome.answer.choices[0] for outcome in candidates]
        proposals = [said(choice) for choice in choices]
        have_calls = any(choice.calls for choice in choices)
        if config.top_k is None:
            return _Layer(outcomes, proposals, have_calls, None)
        vote = await hold_vote(
            proposals,
            config.similarity,
            embedder=self.services.embedder,
            weights=[config.members[outcome.call.member] for outcome in candidates],
            calls=[called(choice) for choice in choices],
        )
        kept = vote.consensus.ranking[: config.top_k]
        report = {"scores": vote.consensus.scores.tolist(), "kept": list(kept)}
        have_calls = any(choices[index].calls for index in kept)
        return _Layer(outcomes, [proposals[index] for index in kept], have_calls, report)

    def _trace(
        self, config: Config, request: GenerationRequest, layers: Sequence[_Layer], done: Done
    ) -> dict[str, Any]:
        """Each layer's candidates and who was silent; `kept`: the numbers of those passed on, in that order."""
        trace: dict[str, Any] = {
            "layers": [
                {**candidates_trace(config, request, layer.outcomes), **(layer.report or {})} for layer in layers
            ],
            "aggregator": config.aggregator,
        }
        return trace if done.trace is None else trace | {"trace": done.trace}
