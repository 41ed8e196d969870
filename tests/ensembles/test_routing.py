from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    MemberUsage,
    Mixture,
    PromptScored,
    Usage,
    collect,
)
from ensemble_server.ensembles.errors import (
    MemberError,
    ModelLoadError,
    OverloadedError,
    RequestError,
    TurnoutError,
    UnsupportedError,
)
from ensemble_server.ensembles.method import Method, Services
from ensemble_server.ensembles.routing import Routing

# The test embedder counts letters, so that a prompt of a's is like the example "a" and unlike "b".
ROUTES = {"ann": {"positive_prompts": ["a"]}, "bob": {"positive_prompts": ["b"]}, "cas": {"positive_prompts": ["c"]}}
ROUTED = {"method": "routing", "members": ROUTES}


def ask(text: str, **changes: Any) -> GenerationRequest:
    return GenerationRequest(messages=({"role": "user", "content": text},), explain=True, **changes)


@pytest.fixture
def members(talker: Callable) -> dict[str, Any]:
    return {name: talker(name, f"{name} speaks") for name in ("ann", "bob", "cas")}


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name"), [("aaab", "ann"), ("bbac", "bob"), ("cc!", "cas")])
async def test_the_member_whose_examples_are_most_like_the_prompt_answers(
    members: dict[str, Any], compose: Callable, text: str, name: str
) -> None:
    answer = await collect(compose(ROUTED, list(members.values())), ask(text))
    assert answer.text == f"{name} speaks"
    assert [len(member.requests) for member in members.values()] == [int(other == name) for other in members]
    assert (answer.done.method, answer.done.members, answer.done.turnout) == ("routing", ("ann", "bob", "cas"), 1)
    assert answer.done.usage.members == {name: MemberUsage(10, 2)}


async def test_gates_are_shown_on_request(members: dict[str, Any], compose: Callable) -> None:
    answer = await collect(compose({**ROUTED, "gate_temperature": 0.2}, list(members.values())), ask("aab"))
    trace = answer.done.trace
    # cosines 2, 1 and 0 over the root of 5; softmax of 5 times these
    assert trace["gates"] == pytest.approx({"ann": 0.8942, "bob": 0.0956, "cas": 0.0102}, abs=1e-4)
    assert sum(trace["gates"].values()) == pytest.approx(1)
    assert (trace["weights"], trace["averaged"], trace["answered"]) == ({"ann": 1.0}, False, ["ann"])
    plain = GenerationRequest(prompt="aab")
    assert (await collect(compose(ROUTED, list(members.values())), plain)).done.trace is None


async def test_negative_examples_push_away(members: dict[str, Any], compose: Callable) -> None:
    routes = {"ann": {"positive_prompts": ["ab"], "negative_prompts": ["b"]}, "bob": {"positive_prompts": ["abc"]}}
    routed = compose({**ROUTED, "members": routes}, [members["ann"], members["bob"]])
    assert (await collect(routed, ask("b"))).text == "bob speaks"
    assert (await collect(routed, ask("a"))).text == "ann speaks"


async def test_what_counts_is_the_users_last_message(members: dict[str, Any], compose: Callable) -> None:
    routed = compose(ROUTED, list(members.values()))
    messages = (
        {"role": "user", "content": "ccc"},
        {"role": "assistant", "content": "aaa"},
        {"role": "user", "content": [{"type": "text", "text": "bbb"}, {"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": "a"},
    )
    assert (await collect(routed, GenerationRequest(messages=messages))).text == "bob speaks"
    assert (await collect(routed, GenerationRequest(prompt="cc"))).text == "cas speaks"
    with pytest.raises(UnsupportedError) as raised:
        await collect(routed, GenerationRequest(prompt=(1, 2)))
    assert raised.value.param == "prompt"


async def test_examples_are_embedded_once(
    members: dict[str, Any], compose: Callable, letter_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[list[str]] = []
    embed = letter_embedder.embed

    async def counting(texts: list[str]) -> Any:
        embedded.append(list(texts))
        return await embed(texts)

    monkeypatch.setattr(letter_embedder, "embed", counting)
    routed = compose(ROUTED, list(members.values()))
    for _ in range(2):
        await collect(routed, ask("a"))
    assert embedded == [["a", "b", "c"], ["a"], ["a"]]


async def test_everything_asked_for_reaches_the_member(members: dict[str, Any], compose: Callable) -> None:
    request = ask("a", n=2, top_logprobs=3)
    answer = await collect(compose(ROUTED, list(members.values())), request)
    assert len(answer.choices) == 2
    assert members["ann"].requests[0] == request


# --- averaging ----------------------------------------------------------------------------------------------------


class Host:
    """A host that notes which mixtures it runs. A member called "odd" has a vocabulary of its own."""

    def __init__(self) -> None:
        self.mixtures: list[Mixture] = []

    def check(self, mixture: Mixture) -> None:
        if "odd" in mixture.weights:
            raise ModelLoadError("vocabularies differ")

    def max_model_len(self, mixture: Mixture) -> int:
        return 64

    async def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        self.mixtures.append(mixture)
        yield PromptScored((1,))
        yield Delta(0, "averaged", finish_reason="stop")
        usage = {name: MemberUsage(1, 1) for name in mixture.weights}
        yield Done(Usage(1, 1, usage), method, tuple(mixture.weights), len(mixture.weights))


class Hosted:
    """A member, or a mixture of several, on a host."""

    max_model_len = 64
    explains_tokens, fan_out = True, 1

    def __init__(self, name: str, host: Host, mixture: Mixture | None = None) -> None:
        self.name, self.host, self.mixture = name, host, mixture or Mixture({name: 1.0})
        self.members = tuple(self.mixture.weights)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        return self.host.generate(self.mixture, request, method="member")


def routed_over(compose: Callable, models: list[Any], **changes: Any) -> Method:
    members = dict(zip([model.name for model in models], ROUTES.values(), strict=False))
    return compose({**ROUTED, "members": members, **changes}, models)


async def test_gates_become_the_weights_of_a_probability_average(compose: Callable) -> None:
    host = Host()
    routed = routed_over(compose, [Hosted(name, host) for name in ("x", "y", "z")], top_k=2, pool="geometric")
    answer = await collect(routed, ask("aab"))
    gates = answer.done.trace["gates"]
    (mixture,) = host.mixtures
    total = gates["x"] + gates["y"]
    assert mixture.weights == pytest.approx({"x": gates["x"] / total, "y": gates["y"] / total})
    assert mixture.pool == "geometric"
    assert (answer.text, answer.done.turnout, answer.done.method) == ("averaged", 2, "routing")
    assert (answer.done.trace["averaged"], answer.done.trace["answered"]) == (True, ["x", "y"])


async def test_shared_members_are_always_in_the_average(compose: Callable) -> None:
    host = Host()
    models = [Hosted(name, host) for name in ("x", "y", "shared")]
    members = {"x": ROUTES["ann"], "y": ROUTES["bob"], "shared": {"always": True, "residual_scale": 3}}
    answer = await collect(compose({**ROUTED, "members": members}, models), ask("b"))
    assert host.mixtures[0].weights == pytest.approx({"y": 0.25, "shared": 0.75})
    assert set(answer.done.trace["gates"]) == {"x", "y"}


async def test_arithmetic_mixtures_are_averaged_member_by_member(compose: Callable) -> None:
    host = Host()
    mix = Hosted("mix", host, Mixture({"x": 1.0, "w": 3.0}))
    answer = await collect(routed_over(compose, [Hosted("x", host), mix], top_k=2), ask("ab"))
    assert host.mixtures[0].weights == pytest.approx({"x": 0.5 + 0.125, "w": 0.375})
    assert answer.done.turnout == 2


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda host: Hosted("odd", host), "vocabularies differ"),
        (lambda host: Hosted("far", Host()), "not on one host"),
        (lambda host: Hosted("guided", host, Mixture({"p": 2.0, "q": -1.0}, "geometric")), "'guided' is a mixture"),
    ],
)
async def test_members_that_cannot_be_averaged_leave_it_to_the_best_gate(
    compose: Callable, other: Callable[[Host], Hosted], reason: str
) -> None:
    host = Host()
    answer = await collect(routed_over(compose, [Hosted("x", host), other(host)], top_k=2), ask("aab"))
    assert [mixture.weights for mixture in host.mixtures] == [{"x": 1.0}]
    assert reason in answer.done.trace["reason"]
    assert answer.done.trace["answered"] == ["x"]


async def test_a_member_that_only_gives_text_leaves_it_to_the_best_gate(compose: Callable, talker: Callable) -> None:
    routed = routed_over(compose, [Hosted("x", Host()), talker("far", "from afar")], top_k=2)
    answer = await collect(routed, ask("b"))
    assert answer.text == "from afar"
    assert answer.done.trace["reason"] == "'far' gives text, not next-token distributions"


# --- failing ------------------------------------------------------------------------------------------------------


async def test_if_the_best_gate_fails_the_next_best_answers(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", MemberError("ann", "gpu on fire"))
    bob, cas = talker("bob", "bob speaks"), talker("cas", "cas speaks")
    answer = await collect(compose(ROUTED, [ann, bob, cas]), ask("aac"))
    assert answer.text == "cas speaks"
    assert answer.done.trace["silent"] == {"ann": "member 'ann': gpu on fire"}
    assert answer.done.trace["answered"] == ["cas"]


async def test_if_all_fail_all_are_named(talker: Callable, compose: Callable) -> None:
    models = [talker(name, MemberError(name, "down")) for name in ROUTES]
    with pytest.raises(TurnoutError, match=r"ann: .*down; bob: .*down; cas: .*down"):
        await collect(compose(ROUTED, models), ask("aaabbc"))
    alone = talker("ann", OverloadedError("the queue is full"))
    with pytest.raises(OverloadedError):
        await collect(compose({**ROUTED, "members": {"ann": ROUTES["ann"]}}, [alone]), ask("a"))


async def test_a_request_at_fault_is_not_tried_on_others(talker: Callable, compose: Callable) -> None:
    models = [talker("ann", RequestError("no", param="stop")), talker("bob", "b"), talker("cas", "c")]
    with pytest.raises(RequestError):
        await collect(compose(ROUTED, models), ask("a"))
    assert not models[1].requests


async def test_an_answer_that_has_begun_is_not_begun_again(compose: Callable, talker: Callable) -> None:
    class Breaks(Hosted):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
            yield Delta(0, "half")
            raise MemberError("ann", "gpu on fire")

    bob = talker("bob", "bob speaks")
    routed = compose({**ROUTED, "members": {"ann": ROUTES["ann"], "bob": ROUTES["bob"]}}, [Breaks("ann", Host()), bob])
    with pytest.raises(MemberError, match="gpu on fire"):
        await collect(routed, ask("a"))
    assert not bob.requests


# --- what configs and requests may say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": {"ann": {}}}, "at least one of positive_prompts"),
        ({"members": {"ann": {"always": True}}}, "top_k is 1, but 0 members are gated"),
        ({"members": {"ann": {"always": True, "positive_prompts": ["a"]}}}, "takes no prompts"),
        ({"members": {"ann": {"positive_prompts": ["a"], "residual_scale": 2}}}, "this one is gated"),
        ({"members": {"ann": ROUTES["ann"], "bob": ROUTES["ann"]}}, "the same prompts"),
        ({"top_k": 4}, "top_k is 4, but 3 members are gated"),
        ({"share": 0.1}, "share belongs to the posterior pool"),
        ({"sources": {"a": "b"}}, "goes with `mergekit_moe`"),
        ({"mergekit_moe": {"experts": []}}, "either `members` or `mergekit_moe`"),
        ({"members": None, "mergekit_moe": {"experts": []}}, r"mergekit_moe\.experts"),
        ({"gate_temperature": 0}, "gate_temperature"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Routing.Config.model_validate({**ROUTED, **changes})


async def test_mergekits_experts_are_routes(members: dict[str, Any], compose: Callable) -> None:
    moe = {
        "base_model": "org/base",
        "experts_per_token": 1,
        "experts": [
            {"source_model": "org/ann-7b", "positive_prompts": ["a"]},
            {"source_model": "bob", "positive_prompts": ["b"], "negative_prompts": ["a"]},
        ],
    }
    config = {"method": "routing", "members": None, "mergekit_moe": moe, "sources": {"org/ann-7b": "ann"}}
    routed = compose(config, [members["ann"], members["bob"]])
    assert routed.config.references() == {"ann", "bob"}
    assert routed.config.top_k == 1
    assert Routing.Config.model_validate({**config, "top_k": 2}).top_k == 2
    answer = await collect(routed, ask("b", overrides={"top_k": 1}))
    assert answer.text == "bob speaks"


async def test_a_request_may_change_how_sharply_is_chosen(members: dict[str, Any], compose: Callable) -> None:
    routed = compose(ROUTED, list(members.values()))
    answer = await collect(routed, ask("aab", overrides={"gate_temperature": 100}))
    assert max(answer.done.trace["gates"].values()) < 0.34
    assert members["ann"].requests[0].overrides == {}
    with pytest.raises(RequestError, match=r"ensemble\.top_k|ensemble"):
        await collect(routed, ask("a", overrides={"top_k": 9}))


def test_without_an_embedding_model_there_is_no_gate(members: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=r"'routed'.*embedding model"):
        Routing("routed", Routing.Config.model_validate(ROUTED), members, Services())
