"""Routing: each request goes to the members whose example prompts are most like it, a mixture of experts per request.

    gates = softmax over members k of  cos(prompt, positive prompts of k less its negative prompts) / gate_temperature

The `top_k` highest gates are taken, renormalised, and joined by the members that are `always` on (shared experts, of
weight `residual_scale` beside gates that sum to one). Where those chosen give next-token distributions on one host and
share a vocabulary, these become the weights of a probability average; with one chosen (switch routing), or where they
cannot be averaged, the best gate answers alone. If it fails before its first token, the next best answers.

When it helps: members that are each good at something that the prompt gives away. It is the cheapest ensemble, and no
better than its members' best. Cost: one call of one member (averaged: of those chosen) and one embedding. Needs: any
members, and an embedding model.

Related: probability_average with the posterior pool, whose weights follow the text token by token.

References: see `ensembles.gating`; the prompts are those of mergekit-moe, whose YAML is read as it is (`mergekit_moe`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ensemble_server.ensembles.base import (
    DistributionModel,
    Done,
    Event,
    GenerationRequest,
    Mixture,
    MixtureHost,
    Model,
    PoolName,
)
from ensemble_server.ensembles.errors import (
    EngineDeadError,
    EnsembleError,
    MemberError,
    ModelLoadError,
    OverloadedError,
    TurnoutError,
    UnsupportedError,
)
from ensemble_server.ensembles.gating import gate_vector, mixture_weights, softmax
from ensemble_server.ensembles.mergekit_moe import MoeConfig, routes
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.ensembles.probability_averaging import Share, mixture_of
from ensemble_server.ensembles.text_level import overridden

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

OVERRIDABLE = ("top_k", "gate_temperature", "pool", "share")
Prompts = tuple[str, ...]


class Route(BaseModel):
    """When a member is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive_prompts: Prompts = Field(default=(), description="examples of prompts that it is good at")
    negative_prompts: Prompts = Field(default=(), description="examples of prompts that it should not get")
    always: bool = Field(default=False, description="a shared expert: on for every request, not gated")
    residual_scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="weight of an always-on member; those of the gates sum to 1"
    )

    @model_validator(mode="after")
    def _is_gated_or_always_on(self) -> Route:
        if self.always and (self.positive_prompts or self.negative_prompts):
            raise ValueError("an always-on member is not gated, so it takes no prompts")
        if not self.always and not self.positive_prompts:
            raise ValueError("needs at least one of positive_prompts, or `always: true`")
        if not self.always and self.residual_scale != 1.0:
            raise ValueError("residual_scale is the weight of an always-on member; this one is gated")
        return self


class Routing(Method):
    reference: ClassVar[str] = "https://arxiv.org/abs/1701.06538"
    overridable: ClassVar[tuple[str, ...]] = OVERRIDABLE

    class Config(MethodConfig):
        yaml_files: ClassVar[tuple[str, ...]] = ("mergekit_moe",)

        members: dict[str, Route] = Field(
            min_length=1, description="map from names to {positive_prompts, negative_prompts, always, residual_scale}"
        )
        mergekit_moe: dict[str, Any] | None = Field(
            default=None, description="instead of members: a mergekit-moe YAML file, or what it holds"
        )
        sources: dict[str, str] | None = Field(
            default=None, description="map from source_model in mergekit_moe to a name here, where they differ"
        )
        top_k: int = Field(default=1, ge=1, description="gated members chosen (mergekit_moe: its experts_per_token)")
        gate_temperature: float = Field(
            default=0.1, gt=0, allow_inf_nan=False, description="of the softmax over cosines: lower is sharper"
        )
        pool: PoolName = Field(default="arithmetic", description="how those chosen are averaged, where they can be")
        share: Share = Field(default=0.0, description="posterior pool only, see probability_average")

        @model_validator(mode="before")
        @classmethod
        def _read_mergekit_moe(cls, data: Any) -> Any:
            if not isinstance(data, dict) or data.get("mergekit_moe") is None:
                return data
            if data.get("members") is not None:
                raise ValueError("give either `members` or `mergekit_moe`")
            try:
                moe = MoeConfig.model_validate(data["mergekit_moe"])
            except ValidationError as exc:
                finding = exc.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in ("mergekit_moe", *finding["loc"]))
                raise ValueError(f"{where}: {finding['msg']}") from exc
            rest = {key: value for key, value in data.items() if key not in ("mergekit_moe", "sources")}
            return {"top_k": moe.experts_per_token, **rest, "members": routes(moe, data.get("sources") or {})}

        @model_validator(mode="after")
        def _can_choose(self) -> Routing.Config:
            gated = [route for route in self.members.values() if not route.always]
            if self.top_k > len(gated):
                raise ValueError(f"top_k is {self.top_k}, but {len(gated)} members are gated")
            if len(gated) > 1 and all(route == gated[0] for route in gated):
                raise ValueError("all gated members have the same prompts, so none could be told from another")
            if self.sources is not None:
                raise ValueError("`sources` goes with `mergekit_moe`")
            mixture_of({"any": 1.0}, self.pool, self.share)
            return self

    config: Config

    def __init__(self, name: str, config: Config, models: Mapping[str, Model], services: Services) -> None:
        super().__init__(name, config, models, services)
        if services.embedder is None:
            raise ModelLoadError(f"model {name!r}: routing compares prompts by an embedding model; set one up")
        self._gates: dict[str, np.ndarray] = {}
        self._gates_lock = asyncio.Lock()
        always = [member for member, route in config.members.items() if route.always]
        if config.top_k > 1 or always:
            mixed = self._mixed(dict.fromkeys(config.members, 1.0), config)
            if isinstance(mixed, str):
                logger.warning("model %r: %s, so the best gate answers alone", name, mixed)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        config = overridden(self.config, request, OVERRIDABLE)
        gates = await self._gate(_prompt_text(request, self.name), config)
        always = {member: route.residual_scale for member, route in config.members.items() if route.always}
        weights = mixture_weights(gates, config.top_k, always)
        asked = replace(request, overrides={})
        trace: dict[str, Any] = {"gates": gates, "weights": weights}
        mixed = self._mixed(weights, config) if len(weights) > 1 else "one member is chosen"
        if isinstance(mixed, str):
            events = self._first_that_answers(sorted(gates, key=lambda member: -gates[member]), asked, trace)
            trace |= {"averaged": False, "reason": mixed}
        else:
            host, mixture = mixed
            events = host.generate(mixture, asked, method=config.method)
            trace |= {"averaged": True, "answered": list(weights)}
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, Done):
                    yield event
                    continue
                inner = {} if event.trace is None else {"trace": event.trace}
                yield replace(
                    event,
                    method=config.method,
                    members=self.members,
                    turnout=len(trace["answered"]),
                    trace=trace | inner if request.explain else None,
                )

    async def _gate(self, text: str, config: Config) -> dict[str, float]:
        """How much each gated member is suited to `text`; sums to one."""
        await self._learn_gates()
        (vector,) = await self.embedder.embed([text])
        scores = [float(gate @ vector) for gate in self._gates.values()]
        return dict(zip(self._gates, softmax(scores, config.gate_temperature), strict=True))

    async def _learn_gates(self) -> None:
        """Embeds the example prompts, once: at the first request, since constructors do not wait."""
        async with self._gates_lock:
            if self._gates:
                return
            gated = {member: route for member, route in self.config.members.items() if not route.always}
            prompts = [
                prompt for route in gated.values() for prompt in (*route.positive_prompts, *route.negative_prompts)
            ]
            vectors = iter(await self.embedder.embed(prompts))
            gates = {}
            for member, route in gated.items():
                positive = [next(vectors) for _ in route.positive_prompts]
                negative = [next(vectors) for _ in route.negative_prompts]
                gates[member] = gate_vector(positive, negative)
            self._gates = gates

    def _mixed(self, weights: Mapping[str, float], config: Config) -> tuple[MixtureHost, Mixture] | str:
        """The weights as one mixture on its host; or why these members cannot be averaged."""
        total: dict[str, float] = {}
        hosts = []
        for name, weight in weights.items():
            model = self.models[name]
            if not isinstance(model, DistributionModel):
                return f"{name!r} gives text, not next-token distributions"
            parts = model.mixture.weights
            if len(parts) > 1 and model.mixture.when is not None:
                return f"{name!r} is a selective average (`when`), which cannot be part of another"
            if len(parts) > 1 and not model.mixture.pool == config.pool == "arithmetic":
                return f"{name!r} is a mixture, and only arithmetic ones can be part of another"
            for part, share in parts.items():
                total[part] = total.get(part, 0.0) + weight * share / sum(parts.values())
            hosts.append(model.host)
        if any(host is not hosts[0] for host in hosts):
            return "its members are not on one host"
        mixture = mixture_of(total, config.pool, config.share)
        try:
            hosts[0].check(mixture)
        except ModelLoadError as exc:
            return f"its members cannot be averaged ({exc})"
        return hosts[0], mixture

    async def _first_that_answers(
        self, members: list[str], request: GenerationRequest, trace: dict[str, Any]
    ) -> AsyncGenerator[Event]:
        """What the first of `members` says that does not fail before it says anything. Notes in `trace` who it was."""
        clock = asyncio.get_running_loop().time
        start = clock()
        errors: dict[str, EnsembleError] = {}
        for member in members:
            left_s = None if request.deadline_s is None else request.deadline_s - (clock() - start)
            trace |= {"answered": [member], "silent": {name: str(error) for name, error in errors.items()}}
            has_begun = False
            try:
                async with aclosing(self.models[member].generate(replace(request, deadline_s=left_s))) as events:
                    async for event in events:
                        has_begun = True
                        yield event
                return
            except (MemberError, EngineDeadError, OverloadedError) as exc:
                if has_begun:
                    raise
                logger.warning("model %r: member %r failed, the next best answers: %s", self.name, member, exc)
                errors[member] = exc
        if len(errors) == 1:
            raise errors.popitem()[1]
        silent = {name: str(error) for name, error in errors.items()}
        raise TurnoutError(self.name, silent, answered=0, required=1) from next(iter(errors.values()))


def _prompt_text(request: GenerationRequest, name: str) -> str:
    """What is compared: the last message of the user, or the raw prompt."""
    if isinstance(request.prompt, str):
        return request.prompt
    if request.messages is None:
        raise UnsupportedError(
            f"model {name!r} routes by the prompt's text, so it takes no token ids; send text", param="prompt"
        )
    content = next((message["content"] for message in reversed(request.messages) if message["role"] == "user"), "")
    if not isinstance(content, str):
        content = " ".join(part["text"] for part in content or () if part.get("type") == "text")
    return content
