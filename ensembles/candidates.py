"""Candidates: the answers among which votes and rankings choose, one for each member and sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from ensemble_server.ensembles.base import GenerationRequest, Model
from ensemble_server.ensembles.fan_out import Call, Outcome
from ensemble_server.ensembles.text_level import TextLevelConfig, member_request


class CandidateConfig(TextLevelConfig):
    """Keys of the methods that choose among candidates."""

    samples: int = Field(default=1, ge=1, le=64, description="answers of each member")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="of the members' sampling; null takes the request's"
    )

    @model_validator(mode="after")
    def _weights_can_be_votes(self) -> CandidateConfig:
        for member, weight in self.members.items():
            if weight < 0:
                raise ValueError(f"a vote takes no negative weight; {member!r} has {weight:g}")
        if not any(self.members.values()):
            raise ValueError("at least one weight must be positive")
        return self

    def num_calls(self, calls: Mapping[str, int]) -> int:
        return self.samples * sum(calls[member] for member, weight in self.members.items() if weight)


def candidate_calls(config: CandidateConfig, models: Mapping[str, Model], request: GenerationRequest) -> list[Call]:
    """A call for each sample of each member, member by member. Members of weight zero are not asked."""
    return [
        Call(member, models[member], member_request(request, member, sample, temperature=config.temperature), sample)
        for member, weight in config.members.items()
        if weight
        for sample in range(config.samples)
    ]


def candidates_trace(
    config: CandidateConfig, request: GenerationRequest, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Who said what, who was silent and why, JSON-ready. Candidates are numbered as they stand here, from 0."""
    candidates, silent = [], []
    for outcome in outcomes:
        call = outcome.call
        if outcome.answer is None:
            silent.append({"member": call.member, "sample": call.sample, "reason": outcome.reason})
            continue
        choice, done = outcome.answer.choices[0], outcome.answer.done
        candidate: dict[str, Any] = {
            "member": call.member,
            "sample": call.sample,
            "weight": config.members[call.member],
            "text": choice.text,
            "finish_reason": choice.finish_reason,
        }
        if choice.calls:
            candidate["calls"] = [{"name": call.name, "arguments": call.arguments} for call in choice.calls]
        candidates.append(candidate if done.trace is None else candidate | {"trace": done.trace})
    return {"candidates": candidates, "silent": silent, "warnings": _warnings(config, request)}


def _warnings(config: CandidateConfig, request: GenerationRequest) -> list[str]:
    temperature = request.sampling.temperature if config.temperature is None else config.temperature
    if temperature == 0 and config.samples > 1:
        return [
            f"{config.samples} samples at temperature 0 are copies of one another, so each member votes "
            f"{config.samples} times for the same answer; give the ensemble a temperature"
        ]
    return []
