from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ensemble_server.ensembles.base import Done, Event, GenerationRequest, Mixture, Usage, When, collect
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage, mixture_of, overridden
from tests.gates import a_gate


@dataclass(eq=False)
class RecordingHost:
    """Remembers which mixtures it was asked to check and to run."""

    checked: list[Mixture] = field(default_factory=list)
    ran: list[tuple[Mixture, str]] = field(default_factory=list)

    def check(self, mixture: Mixture) -> None:
        self.checked.append(mixture)

    def max_model_len(self, mixture: Mixture) -> int:
        return 100 * len(mixture.weights)

    async def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        self.ran.append((mixture, method))
        yield Done(Usage(), method, tuple(mixture.weights), len(mixture.weights))


@dataclass(eq=False)
class Hosted:
    name: str
    host: RecordingHost
    max_model_len: int | None = 50
    explains_tokens: bool = True
    fan_out: int = 1

    @property
    def members(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def mixture(self) -> Mixture:
        return Mixture({self.name: 1.0})

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        return self.host.generate(self.mixture, request, method="member")


class Remote:
    """Generates text, and nothing else."""

    name, members, max_model_len = "remote", ("remote",), None
    explains_tokens, fan_out = False, 1

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        raise NotImplementedError


def average(host: RecordingHost, **config: Any) -> ProbabilityAverage:
    parsed = ProbabilityAverage.Config.model_validate({"method": "probability_average", **config})
    return ProbabilityAverage("mix", parsed, {name: Hosted(name, host) for name in parsed.members}, Services())


def config_problem(**config: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        ProbabilityAverage.Config.model_validate({"method": "probability_average", **config})
    return str(caught.value)


def request(**overrides: Any) -> GenerationRequest:
    return GenerationRequest(prompt="x", overrides=overrides)


# --- composed ---


def test_all_members_are_checked_when_composed_also_those_that_rest() -> None:
    host = RecordingHost()
    mix = average(host, members={"base": 1, "code": 2, "idle": 0}, pool="posterior", share=0.01)
    assert [set(mixture.weights) for mixture in host.checked] == [{"base", "code", "idle"}]
    assert mix.mixture == Mixture({"base": 1.0, "code": 2.0}, "posterior", 0.01)
    assert mix.members == ("base", "code", "idle")
    assert mix.max_model_len == 200


async def test_it_runs_as_one_mixture_on_its_host() -> None:
    host = RecordingHost()
    mix = average(host, members=["base", "code"])
    answer = await collect(mix, GenerationRequest(prompt="x", n=1))
    assert host.ran == [(Mixture({"base": 1.0, "code": 1.0}), "probability_average")]
    assert answer.done.members == ("base", "code")


async def test_a_request_may_change_weights_pool_and_share() -> None:
    host = RecordingHost()
    mix = average(host, members=["base", "code"])
    changes = {"weights": {"base": 1, "code": 0.5}, "pool": "posterior", "share": 0.1}
    await collect(mix, request(**changes))
    assert host.ran[0][0] == Mixture({"base": 1.0, "code": 0.5}, "posterior", 0.1)
    assert mix.mixture == Mixture({"base": 1.0, "code": 1.0})


async def test_a_request_may_set_or_drop_where_others_are_asked() -> None:
    host = RecordingHost()
    mix = average(host, members=["base", "code"], when={"entropy": 1.5})
    assert mix.mixture == Mixture({"base": 1.0, "code": 1.0}, when=When(entropy=1.5))
    for when, expected in [({"disagree": 0.3}, When(disagree=0.3)), (None, None)]:
        await collect(mix, request(when=when))
        assert host.ran[-1][0].when == expected


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({"entropi": 1}, r"unknown key 'ensemble\.when\.entropi'; did you mean 'entropy'\?"),
        ({"entropy": 1, "disagree": 0.1}, "one of the two"),
        ({}, "one of the two"),
        ({"disagree": 1.5}, r"ensemble\.when\.disagree must be less than or equal to 1, got 1\.5"),
        ({"entropy": -1}, r"ensemble\.when\.entropy must be greater than or equal to 0, got -1"),
        (0.3, r"ensemble\.when .*got 0\.3"),
    ],
)
async def test_a_rule_that_is_none_is_refused_by_name(when, problem) -> None:
    mix = average(RecordingHost(), members=["base", "code"])
    with pytest.raises(RequestError, match=problem):
        mix.generate(request(when=when))


async def test_a_host_that_has_to_ask_everybody_refuses_a_request_with_a_rule(monkeypatch) -> None:
    def refuse(self, mixture: Mixture) -> None:
        if mixture.when is not None:
            raise ModelLoadError("when: not here")

    monkeypatch.setattr(RecordingHost, "check", refuse)
    mix = average(RecordingHost(), members=["base", "code"])
    with pytest.raises(UnsupportedError, match=r"ensemble\.when: when: not here"):
        mix.generate(request(when={"entropy": 1}))


def test_a_rule_over_bytes_is_refused_in_the_config() -> None:
    assert "leave out `vocabulary: bytes`" in config_problem(
        members=["a", "b"], vocabulary="bytes", when={"entropy": 1}
    )


async def test_bytes_may_be_asked_for_in_the_config_and_stay_whatever_a_request_changes() -> None:
    host = RecordingHost()
    mix = average(host, members=["base", "code"], vocabulary="bytes")
    assert {mixture.vocabulary for mixture in host.checked} == {"bytes"}
    await collect(mix, request(weights={"base": 1}, heal=False))
    assert host.ran[0][0] == Mixture({"base": 1.0}, vocabulary="bytes", heals=False)
    with pytest.raises(RequestError, match=r"ensemble\.heal must be true or false"):
        await collect(mix, request(heal="no"))


def test_members_that_only_give_text_are_refused_by_name() -> None:
    host = RecordingHost()
    config = ProbabilityAverage.Config(method="probability_average", members={"base": 1, "remote": 1})
    with pytest.raises(ModelLoadError, match=r"'mix': member 'remote' .*needs hosted members"):
        ProbabilityAverage("mix", config, {"base": Hosted("base", host), "remote": Remote()}, Services())


def test_an_average_of_averages_is_refused() -> None:
    host = RecordingHost()
    inner = average(host, members=["base", "code"])
    config = ProbabilityAverage.Config(method="probability_average", members={"base": 1, "mix": 1})
    with pytest.raises(ModelLoadError, match="list its members here"):
        ProbabilityAverage("outer", config, {"base": Hosted("base", host), "mix": inner}, Services())


def test_members_on_two_hosts_are_refused() -> None:
    config = ProbabilityAverage.Config(method="probability_average", members={"a": 1, "b": 1})
    models = {name: Hosted(name, RecordingHost()) for name in ("a", "b")}
    with pytest.raises(ModelLoadError, match="'mix': its members are not on one host"):
        ProbabilityAverage("mix", config, models, Services())


# --- what a config may say ---


def test_defaults_are_the_arithmetic_mean_of_equals() -> None:
    config = ProbabilityAverage.Config.model_validate({"method": "probability_average", "members": ["a", "b"]})
    assert (config.members, config.pool, config.share) == ({"a": 1.0, "b": 1.0}, "arithmetic", 0.0)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"members": {"a": 1, "b": -1}}, "the arithmetic pool takes no negative weight; 'b' has -1"),
        ({"members": {"a": 1, "b": -1}, "pool": "posterior"}, "the posterior pool takes no negative weight"),
        ({"members": {"a": 0, "b": 0}}, "at least one weight must be positive"),
        ({"members": {"a": -1, "b": -2}, "pool": "geometric"}, "at least one weight must be positive"),
        ({"members": ["a"], "share": 0.1}, "share belongs to the posterior pool, not to 'arithmetic'"),
        ({"members": ["a"], "pool": "posterior", "share": 1}, "share"),
        ({"members": ["a"], "pool": "harmonic"}, "pool"),
        ({"members": {"a": math.inf}}, "finite"),
        ({"members": {"a": math.nan}}, "finite"),
        ({"members": {}}, "members"),
    ],
)
def test_a_config_that_fits_no_pool_is_refused(config: dict[str, Any], problem: str) -> None:
    assert problem in config_problem(**config)


def test_negative_weights_belong_to_the_geometric_pool() -> None:
    mixture = mixture_of({"large": 1, "expert": 1, "base": -1}, "geometric", 0)
    assert mixture.weights == {"large": 1.0, "expert": 1.0, "base": -1.0}


def test_weight_zero_is_absence() -> None:
    assert mixture_of({"a": 1, "b": 0, "c": -0.0}, "geometric", 0) == Mixture({"a": 1.0}, "geometric")


# --- what a request may change ---

MIXTURE = Mixture({"base": 1.0, "code": 2.0}, "posterior", 0.1)
MEMBERS = ("base", "code", "idle")


def test_nothing_changes_without_overrides() -> None:
    assert overridden(MIXTURE, MEMBERS, {}) == MIXTURE


def test_members_that_are_left_out_do_not_run_and_idle_ones_can_be_called_in() -> None:
    assert overridden(MIXTURE, MEMBERS, {"weights": {"idle": 2}}).weights == {"idle": 2.0}


def test_another_pool_takes_no_share_along() -> None:
    assert overridden(MIXTURE, MEMBERS, {"pool": "geometric"}) == Mixture(MIXTURE.weights, "geometric", 0.0)


def test_the_posterior_asked_for_by_a_request_is_plain_bayes() -> None:
    arithmetic = Mixture(MIXTURE.weights)
    assert overridden(arithmetic, MEMBERS, {"pool": "posterior"}) == Mixture(MIXTURE.weights, "posterior", 0.0)


def test_members_keep_the_order_of_the_config() -> None:
    """The first one's view of text is the ensemble's, whatever order a client writes weights in."""
    assert list(overridden(MIXTURE, MEMBERS, {"weights": {"code": 1, "base": 1}}).weights) == ["base", "code"]


@pytest.mark.parametrize(
    ("overrides", "param", "message"),
    [
        (
            {"wieghts": {}},
            "ensemble.wieghts",
            "unknown key 'ensemble.wieghts'; did you mean 'weights'? (known: weights",
        ),
        ({"zzz": 1}, "ensemble.zzz", "unknown key 'ensemble.zzz' (known: weights, pool, share, when, heal)"),
        ({"weights": [1, 2]}, "ensemble.weights", "must map member names to numbers"),
        ({"weights": {"base": "1"}}, "ensemble.weights.base", "must be a number"),
        ({"weights": {"base": True}}, "ensemble.weights.base", "must be a number"),
        ({"weights": {"base": None}}, "ensemble.weights.base", "must be a number"),
        (
            {"weights": {"stranger": 1}},
            "ensemble.weights",
            "'stranger', which is no member (members: base, code, idle)",
        ),
        ({"weights": {}}, "ensemble.weights", "at least one weight must be positive"),
        ({"weights": {"base": math.nan}}, "ensemble.weights", "finite"),
        ({"weights": {"base": -1, "code": 1}}, "ensemble.weights", "the posterior pool takes no negative weight"),
        ({"weights": {"base": 10**400}}, "ensemble.weights", "finite"),
        ({"weights": {"base": 1e39, "code": -1}, "pool": "geometric"}, "ensemble.weights", "1e+39"),
        ({"pool": "mean"}, "ensemble.pool", "must be one of arithmetic, geometric, posterior, got 'mean'"),
        ({"pool": None}, "ensemble.pool", "must be one of"),
        ({"pool": ["arithmetic"]}, "ensemble.pool", "must be one of"),
        ({"share": 1}, "ensemble.share", "from 0 to below 1, got 1"),
        ({"share": -0.1}, "ensemble.share", "from 0 to below 1"),
        ({"share": math.nan}, "ensemble.share", "from 0 to below 1"),
        ({"share": "0.1"}, "ensemble.share", "from 0 to below 1"),
        ({"pool": "arithmetic", "share": 0.1}, "ensemble.share", "share belongs to the posterior pool"),
    ],
)
def test_wrong_overrides_are_refused_by_name(overrides: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        overridden(MIXTURE, MEMBERS, overrides)
    assert message in str(caught.value)
    assert caught.value.param == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*MEMBERS, "x"]), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["weights", "pool", "share", "x"]), json_values, max_size=3))
def test_any_override_is_a_valid_mixture_or_a_request_error(overrides: dict[str, Any]) -> None:
    try:
        mixture = overridden(MIXTURE, MEMBERS, overrides)
    except RequestError as exc:
        assert exc.param.startswith("ensemble.")
    else:
        assert mixture == mixture_of(mixture.weights, mixture.pool, mixture.share)
        assert set(mixture.weights) <= set(MEMBERS)


# --- a gate ----------------------------------------------------------------------------------------------------------

TWO = {"base": 1.0, "code": 3.0}
GATED = {"members": TWO, "pool": "posterior", "share": 0.05}


async def test_a_gate_goes_with_the_pool_that_it_was_trained_for_and_with_no_other() -> None:
    host = RecordingHost()
    gate = a_gate({"code": 3, "base": 1})  # in the order of the members, whatever its own
    mix = average(host, **GATED, gate=gate)
    assert list(mix.mixture.gate.members) == ["base", "code"]
    assert host.checked[0].gate == mix.mixture.gate
    for changes in ({}, {"weights": TWO}, {"pool": "arithmetic"}, {"share": 0.05}):
        await collect(mix, request(**changes))
        assert host.ran[-1][0].gate == (None if changes else mix.mixture.gate)
    with pytest.raises(RequestError, match=r"ensemble\.when: the gate"):
        mix.generate(request(when={"entropy": 1}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pool": "arithmetic", "share": 0}, "posterior pool; arithmetic has no such weights"),
        ({"members": {"base": 1, "other": 3}}, "was trained for base, code; the pool has base, other.*'code'"),
        ({"members": {"base": 1, "code": 1}}, "a weight of 0.25 for 'base', of 1 in all; here it has 0.5"),
        ({"share": 0.1}, "trained with `share: 0.05`, the pool has 0.1"),
        ({"when": {"entropy": 1}}, "`when` does not"),
        ({"vocabulary": "bytes"}, "`vocabulary: bytes` does not"),
    ],
)
def test_a_gate_for_another_pool_is_refused_by_name(changes, problem) -> None:
    with pytest.raises(ValidationError, match=problem):
        ProbabilityAverage.Config(method="probability_average", **GATED | changes, gate=a_gate(TWO))
