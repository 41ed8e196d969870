"""Probability averaging: the members' next-token distributions are pooled at every decode step.

    log p(token) = pool over members k of log p_k(token), with weights w_k

When it helps: members that know different things (fine-tunes of one base, models of different families). Cost: one
forward of each member per token; members that are adapters of one base share theirs. Needs: members on one host.
Members of different vocabularies are averaged over text, byte by byte: p(byte) in place of p(token), each member's own
tokens summed out (`ensembles.spelling`). The pools and their formulas are in `ensembles.pooling`. With `when` the
member that weighs most writes, and the others have a say only where the rule says (`ensembles.pooling.selective`). With
`gate` the weights of a posterior pool are moved at each token by what was learnt from text (`ensembles.pooling.gated`).
A request may override `weights`, `pool`, `share` and `when`, and with `heal: false` that members of different
vocabularies begin before a raw prompt's last word. The gate holds for the pool that it was trained for: a request with
`weights`, `pool` or `share` of its own is answered without it.

Reference: Stone, "The opinion pool", 1961 (arithmetic); Hinton, "Products of experts", 1999 (geometric);
Herbster & Warmuth, "Tracking the best expert", 1998 (posterior with fixed share).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from ensemble_server.ensembles.base import (
    DistributionModel,
    Event,
    Gate,
    GenerationRequest,
    Mixture,
    Model,
    PoolName,
    When,
)
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.ensembles.overrides import check_keys, check_overrides

OVERRIDABLE = ("weights", "pool", "share", "when")
POOLS = ("arithmetic", "geometric", "posterior")
AUTO = "auto"
PRIOR_TOLERANCE = 1e-4  # weights in a config have four decimals where they were fitted
MAX_WEIGHT = 1e6  # in size; a log-probability times a weight must fit into float32 with digits to spare


def _checked_share(value: Any) -> Any:
    if value == AUTO:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"must be auto, or a number from 0 to below 1, got {value!r}")
    return float(value)


Share = Annotated[
    float | Literal["auto"],
    BeforeValidator(_checked_share),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"const": AUTO}]}),
]


class ProbabilityAverage(Method):
    reference = "https://doi.org/10.1214/aoms/1177704873"
    explains_tokens = True
    overridable = OVERRIDABLE

    class Config(MethodConfig):
        yaml_files: ClassVar[tuple[str, ...]] = ("gate",)

        pool: PoolName = Field(default="arithmetic", description="arithmetic | geometric | posterior")
        share: Share = Field(
            default=0.0,
            description="posterior only: part of the weights that returns to the prior at each token or byte, or auto",
        )
        vocabulary: Literal["auto", "bytes"] = Field(
            default="auto",
            description="what is averaged: auto (tokens if all members have the same, else bytes) | bytes",
        )

        when: When | None = Field(
            default=None,
            description="where members have a say besides the one that weighs most, which writes: {entropy: nats} or "
            "{disagree: 0 to 1}; default: everywhere",
        )

        gate: Gate | None = Field(
            default=None,
            description="posterior only: what `ensemble fit --gate` learnt, which moves the weights at each token; the "
            "path of its YAML file",
        )

        @model_validator(mode="after")
        def _weights_fit_the_pool(self) -> ProbabilityAverage.Config:
            mixture = mixture_of(self.members, self.pool, self.share)
            if self.gate is not None:
                _check_gate(self.gate, mixture)
                if self.when is not None or self.vocabulary == "bytes":
                    other = "`vocabulary: bytes`" if self.when is None else "`when`"
                    raise ValueError(
                        f"gate: weighs all members at every token, which {other} does not go with; choose one"
                    )
            if self.when is not None and self.vocabulary == "bytes":
                raise ValueError("when: is for members that are averaged over tokens; leave out `vocabulary: bytes`")
            return self

    config: Config

    def __init__(self, name: str, config: Config, models: Mapping[str, Model], services: Services) -> None:
        super().__init__(name, config, models, services)
        hosts = set()
        for member in self.members:
            model = models[member]
            if isinstance(model, ProbabilityAverage):
                raise ModelLoadError(
                    f"model {name!r}: member {member!r} is a probability average itself; list its members here, "
                    "with the weights that they have in it"
                )
            if not isinstance(model, DistributionModel):
                raise ModelLoadError(
                    f"model {name!r}: member {member!r} gives text, not next-token distributions; "
                    "probability_average needs hosted members (crowd_vote and others take any model)"
                )
            hosts.add(model.host)
        if len(hosts) != 1:
            raise ModelLoadError(f"model {name!r}: its members are not on one host")
        self.host = hosts.pop()
        plain = mixture_of(config.members, config.pool, config.share)
        gate = config.gate and config.gate.model_copy(
            update={"members": {member: config.gate.members[member] for member in plain.weights}}  # in their order
        )
        self.mixture = replace(plain, vocabulary=config.vocabulary, when=config.when, gate=gate)
        everyone = Mixture(dict.fromkeys(self.members, 1.0), vocabulary=config.vocabulary, when=config.when, gate=gate)
        self.host.check(everyone)  # a request may call in members of weight zero
        self.max_model_len = self.host.max_model_len(self.mixture)

    @property
    def fan_out(self) -> int:
        return 1  # members run as one sequence

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        mixture = overridden(self.mixture, self.members, request.overrides)
        if mixture.when is not None and self.mixture.when is None:
            try:
                self.host.check(mixture)
            except ModelLoadError as exc:
                raise UnsupportedError(f"ensemble.when: {exc}", param="ensemble.when") from exc
        return self.host.generate(mixture, request, method=self.config.method)


def mixture_of(weights: Mapping[str, float], pool: PoolName, share: float | Literal["auto"]) -> Mixture:
    """A checked mixture. Raises `ValueError` if the weights do not fit the pool.

    Arithmetic and posterior weights are probabilities up to a factor: none negative. Geometric weights may be negative
    (contrastive decoding, proxy tuning, classifier-free guidance). Weights of zero are dropped.
    """
    for member, weight in weights.items():
        if not abs(weight) <= MAX_WEIGHT:  # so that NaN is caught, too
            raise ValueError(f"weights must be finite, at most {MAX_WEIGHT:g} in size; {member!r} has {weight!r:.12}")
    if share and pool != "posterior":
        raise ValueError(f"share belongs to the posterior pool, not to {pool!r}")
    negative = [member for member, weight in weights.items() if weight < 0]
    if negative and pool != "geometric":
        raise ValueError(f"the {pool} pool takes no negative weight; {negative[0]!r} has {weights[negative[0]]:g}")
    if not any(weight > 0 for weight in weights.values()):
        raise ValueError("at least one weight must be positive")
    return Mixture({member: float(weight) for member, weight in weights.items() if weight}, pool, share)


def _check_gate(gate: Gate, mixture: Mixture) -> None:
    """Raise `ValueError` unless `gate` was trained for this pool: its members, their weights and its share."""
    if mixture.pool != "posterior":
        raise ValueError(f"gate: moves the weights of a posterior pool; {mixture.pool} has no such weights")
    if strangers := sorted(set(gate.members) ^ set(mixture.weights)):
        raise ValueError(
            f"gate: was trained for {', '.join(gate.members)}; the pool has {', '.join(mixture.weights)}, they "
            f"differ in {strangers[0]!r}; train it again with `ensemble fit --gate`"
        )
    total = sum(mixture.weights.values())
    for name, weight in mixture.weights.items():
        if abs(weight / total - gate.members[name].prior) > PRIOR_TOLERANCE:
            raise ValueError(
                f"gate: was trained with a weight of {gate.members[name].prior:.4g} for {name!r}, of 1 in all; here it "
                f"has {weight / total:.4g}; train it again with `ensemble fit --gate`"
            )
    if gate.share != mixture.share:
        raise ValueError(
            f"gate: was trained with `share: {gate.share}`, the pool has {mixture.share}; write that share, or train "
            "the gate again with `ensemble fit --gate`"
        )


def overridden(mixture: Mixture, members: Sequence[str], overrides: Mapping[str, Any]) -> Mixture:
    """`mixture` with the request's weights, pool, share and `when` in place of its own.

    Members left out of `weights` rest. `members`: all that may be named. Raises `RequestError` naming the field.
    """
    check_overrides(overrides, (*OVERRIDABLE, "heal"), members)
    weights = overrides.get("weights", mixture.weights)
    pool = overrides.get("pool", mixture.pool)
    if pool not in POOLS:
        raise RequestError(f"ensemble.pool must be one of {', '.join(POOLS)}, got {pool!r}", param="ensemble.pool")
    share = overrides.get("share", mixture.share if pool == "posterior" else 0.0)
    try:
        share = _checked_share(share)
    except ValueError as exc:
        raise RequestError(f"ensemble.share {exc}", param="ensemble.share") from exc
    if share and pool != "posterior":
        raise RequestError(f"share belongs to the posterior pool, not to {pool!r}", param="ensemble.share")
    try:
        # in the config's order: the first member's view of text is the ensemble's, however a client sorts its weights
        wanted = mixture_of({name: weights[name] for name in members if name in weights}, pool, share)
    except ValueError as exc:
        raise RequestError(str(exc), param="ensemble.weights") from exc
    heals = overrides.get("heal", mixture.heals)
    if not isinstance(heals, bool):
        raise RequestError(f"ensemble.heal must be true or false, got {heals!r}", param="ensemble.heal")
    when = _checked_when(overrides["when"]) if "when" in overrides else mixture.when
    gate = None if {"weights", "pool", "share"} & overrides.keys() else mixture.gate
    if gate is not None and when is not None:
        raise RequestError(
            "ensemble.when: the gate of this ensemble weighs all members at every token; with weights, a pool or a "
            "share of its own a request is answered without it",
            param="ensemble.when",
        )
    return replace(wanted, vocabulary=mixture.vocabulary, heals=heals, when=when, gate=gate)


def _checked_when(value: Any) -> When | None:
    """A request's own rule; null: all members everywhere."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        check_keys(value, tuple(When.model_fields), "ensemble.when")
    try:
        return When.model_validate(value)
    except ValidationError as exc:
        first = exc.errors()[0]
        path = ".".join(["ensemble.when", *map(str, first["loc"])])
        rule = first.get("ctx", {}).get("error") or first["msg"].replace("Input should", "must")
        raise RequestError(f"{path} {rule}, got {first['input']!r:.60}", param="ensemble.when") from exc
