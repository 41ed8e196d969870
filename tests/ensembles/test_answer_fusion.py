from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.answer_fusion import AnswerFusion, fused
from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    MemberUsage,
    PromptScored,
    Sampling,
    TokenLogprob,
    Usage,
    collect,
)
from ensemble_server.ensembles.errors import (
    DeadlineError,
    MemberError,
    ModelLoadError,
    RequestError,
    TurnoutError,
    UnsupportedError,
)
from ensemble_server.ensembles.method import Services

FOREVER = float("inf")
QUESTION = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
FUSION = {"method": "answer_fusion", "members": ["ann", "bob"], "aggregator": "eve", "instruction": "Fuse."}


def ask(**changes: Any) -> GenerationRequest:
    return GenerationRequest(messages=QUESTION, explain=True, **changes)


# --- layers -------------------------------------------------------------------------------------------------------


async def test_the_aggregator_reads_numbered_proposals_and_writes_the_reply(
    talker: Callable, compose: Callable
) -> None:
    ann, bob, eve = talker("ann", "because a\n"), talker("bob", "because b"), talker("eve", "so both")
    answer = await collect(compose(FUSION, [ann, bob, eve]), ask())
    assert answer.text == "so both"
    assert ann.requests[0].messages == bob.requests[0].messages == QUESTION
    assert eve.requests[0].messages == (
        QUESTION[0],
        {"role": "user", "content": "Why?\n\nFuse.\n\n1. because a\n\n2. because b"},
    )
    done = answer.done
    assert (done.method, done.members, done.turnout) == ("answer_fusion", ("ann", "bob", "eve"), 3)
    assert done.usage.members == {name: MemberUsage(10, 2) for name in ("ann", "bob", "eve")}
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (30, 6)


async def test_every_layer_reads_the_layer_before_it(talker: Callable, compose: Callable) -> None:
    ann, bob, eve = talker("ann", "a0", "a1", "a2"), talker("bob", "b0", "b1", "b2"), talker("eve", "end")
    answer = await collect(compose({**FUSION, "layers": 3}, [ann, bob, eve]), ask())
    for member in (ann, bob):
        read = [request.messages[-1]["content"] for request in member.requests]
        assert read == ["Why?", "Why?\n\nFuse.\n\n1. a0\n\n2. b0", "Why?\n\nFuse.\n\n1. a1\n\n2. b1"]
    assert eve.requests[0].messages[-1]["content"].endswith("1. a2\n\n2. b2")
    assert len(answer.done.trace["layers"]) == 3
    assert answer.done.usage.members["ann"].prompt_tokens == 30


async def test_proposals_are_ranked_by_the_crowd_and_cut(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "x y z"), talker("bob", "a b c d"), talker("cas", "a b c"), talker("eve", "end")]
    config = {**FUSION, "members": ["ann", "bob", "cas"], "top_k": 2}
    answer = await collect(compose(config, members), ask())
    # bob and cas are alike; of equal scores the first goes first
    assert members[-1].requests[0].messages[-1]["content"].endswith("Fuse.\n\n1. a b c d\n\n2. a b c")
    (layer,) = answer.done.trace["layers"]
    assert layer["kept"] == [1, 2]
    assert [candidate["text"] for candidate in layer["candidates"]] == ["x y z", "a b c d", "a b c"]


async def test_an_aggregator_may_propose_as_well(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "a", "fused"), talker("bob", "b")
    answer = await collect(compose({**FUSION, "aggregator": "ann"}, [ann, bob]), ask())
    assert (answer.text, answer.done.members, answer.done.turnout) == ("fused", ("ann", "bob"), 2)
    assert answer.done.usage.members["ann"] == MemberUsage(20, 2)


def test_the_aggregator_is_among_the_references() -> None:
    config = AnswerFusion.Config.model_validate(FUSION)
    assert config.references() == {"ann", "bob", "eve"}


def test_proposals_go_into_every_form_of_request() -> None:
    parts = ({"role": "user", "content": [{"type": "text", "text": "Why?"}]},)
    content = fused(GenerationRequest(messages=parts), ["a"], "Fuse.").messages[0]["content"]
    assert [part["text"] for part in content] == ["Why?", "\n\nFuse.\n\n1. a"]

    prefilled = (*QUESTION, {"role": "assistant", "content": "Well,"})
    messages = fused(GenerationRequest(messages=prefilled), ["a"], "Fuse.").messages
    assert messages == (*prefilled, {"role": "user", "content": "Fuse.\n\n1. a"})

    assert fused(GenerationRequest(prompt="Q: why?\nA:"), ["a"], "Fuse.").prompt == "Fuse.\n\n1. a\n\nQ: why?\nA:"


# --- streaming ----------------------------------------------------------------------------------------------------


class Scribe:
    """An aggregator that reads tokens itself and gives logprobs, as a hosted one does."""

    name, members, max_model_len = "eve", ("eve",), 100
    explains_tokens, fan_out = True, 1

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.is_closed = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        token = TokenLogprob(1, "so", b"so", -0.5)
        try:
            yield PromptScored((1, 2, 3))
            yield Delta(0, "so", (1,), (token,))
            await self.may_go_on.wait()
            yield Delta(0, " be it", (2, 3), finish_reason="stop")
            yield Done(Usage(3, 3, {"eve": MemberUsage(3, 3)}), "member", ("eve",), 1)
        finally:
            self.is_closed = True


async def test_the_aggregators_tokens_pass_through_as_they_come(talker: Callable, compose: Callable) -> None:
    eve = Scribe()
    fusion = compose(FUSION, [talker("ann", "a"), talker("bob", "b"), eve])
    async with aclosing(fusion.generate(ask(top_logprobs=0))) as events:
        first = await asyncio.wait_for(anext(events), 1)
        assert (first.text, first.tokens[0].logprob) == ("so", -0.5)
        eve.may_go_on.set()
        rest = [event async for event in events]
    assert [type(event) for event in rest] == [Delta, Done]
    assert rest[0].text == " be it"


async def test_leaving_while_the_aggregator_writes_closes_it(talker: Callable, compose: Callable) -> None:
    eve = Scribe()
    async with aclosing(compose(FUSION, [talker("ann", "a"), talker("bob", "b"), eve]).generate(ask())) as events:
        await anext(events)
    assert eve.is_closed


async def test_proposers_are_not_asked_for_logprobs(talker: Callable, compose: Callable) -> None:
    ann, bob, eve = talker("ann", "a"), talker("bob", "b"), talker("eve", "end")
    await collect(compose(FUSION, [ann, bob, eve]), ask(top_logprobs=3))
    assert [member.requests[0].top_logprobs for member in (ann, bob, eve)] == [None, None, 3]


async def test_several_choices_are_written_from_the_same_proposals(talker: Callable, compose: Callable) -> None:
    ann, bob, eve = talker("ann", "a"), talker("bob", "b"), talker("eve", "end")
    answer = await collect(compose(FUSION, [ann, bob, eve]), ask(n=3, sampling=Sampling(seed=7)))
    assert [choice.text for choice in answer.choices] == ["end"] * 3
    assert [len(member.requests) for member in (ann, bob, eve)] == [1, 1, 1]
    assert (ann.requests[0].n, eve.requests[0].n) == (1, 3)
    assert ann.requests[0].sampling.seed != bob.requests[0].sampling.seed


# --- failing ------------------------------------------------------------------------------------------------------


async def test_a_silent_proposer_is_left_out(talker: Callable, compose: Callable) -> None:
    bob = talker("bob", MemberError("bob", "gpu on fire"))
    eve = talker("eve", "end")
    answer = await collect(compose(FUSION, [talker("ann", "a"), bob, eve]), ask())
    assert eve.requests[0].messages[-1]["content"].endswith("Fuse.\n\n1. a")
    assert answer.done.turnout == 2
    assert answer.done.trace["layers"][0]["silent"][0]["reason"] == "member 'bob': gpu on fire"


async def test_too_few_proposals_are_an_error_before_the_aggregator(talker: Callable, compose: Callable) -> None:
    bob, eve = talker("bob", MemberError("bob", "gpu on fire")), talker("eve", "end")
    with pytest.raises(TurnoutError, match="min_turnout is 2"):
        await collect(compose({**FUSION, "min_turnout": 2}, [talker("ann", "a"), bob, eve]), ask())
    assert not eve.requests


async def test_an_aggregator_that_fails_is_an_error_that_names_it(talker: Callable, compose: Callable) -> None:
    eve = talker("eve", MemberError("eve", "gpu on fire"))
    with pytest.raises(MemberError, match="member 'eve': gpu on fire"):
        await collect(compose(FUSION, [talker("ann", "a"), talker("bob", "b"), eve]), ask())


async def test_a_slow_proposer_leaves_time_for_the_aggregator(talker: Callable, compose: Callable) -> None:
    eve = talker("eve", "end", delay_s=0.05)
    fusion = compose(FUSION, [talker("ann", "a"), talker("bob", "b", delay_s=FOREVER), eve])
    answer = await collect(fusion, ask(deadline_s=0.4))
    assert answer.text == "end"
    assert 0.1 < eve.requests[0].deadline_s <= 0.21


async def test_without_any_proposal_in_time_the_deadline_is_the_error(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "a", delay_s=FOREVER), talker("bob", "b", delay_s=FOREVER), talker("eve", "end")]
    with pytest.raises(DeadlineError):
        await collect(compose(FUSION, members), ask(deadline_s=0.1))


# --- what configs and requests may say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aggregator": None}, "aggregator"),
        ({"layers": 0}, "layers"),
        ({"layers": 4}, "layers"),
        ({"top_k": 0}, "top_k"),
        ({"members": {"ann": -1, "bob": 1}}, "no negative weight"),
        ({"judge": "eve"}, "judge"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        AnswerFusion.Config.model_validate({**FUSION, **changes})


def test_ranking_by_embeddings_needs_an_embedding_model(talker: Callable) -> None:
    models = {name: talker(name, "x") for name in ("ann", "bob", "eve")}
    ranked = AnswerFusion.Config.model_validate({**FUSION, "top_k": 1, "similarity": "embedding"})
    with pytest.raises(ModelLoadError, match=r"'fused'.*embedding model"):
        AnswerFusion("fused", ranked, models, Services())
    AnswerFusion("fused", ranked.model_copy(update={"top_k": None}), models, Services())  # nothing is ranked


async def test_a_request_may_change_layers_and_members(talker: Callable, compose: Callable) -> None:
    ann, bob, eve = talker("ann", "a"), talker("bob", "b"), talker("eve", "end")
    fusion = compose(FUSION, [ann, bob, eve])
    await collect(fusion, ask(overrides={"layers": 2, "weights": {"ann": 1, "bob": 0}}))
    assert [len(member.requests) for member in (ann, bob, eve)] == [2, 0, 1]
    assert eve.requests[0].overrides == {}
    with pytest.raises(RequestError, match=r"unknown key 'ensemble.aggregator'"):
        await collect(fusion, ask(overrides={"aggregator": "ann"}))


async def test_a_prompt_of_token_ids_is_refused(talker: Callable, compose: Callable) -> None:
    fusion = compose(FUSION, [talker("ann", "a"), talker("bob", "b"), talker("eve", "end")])
    with pytest.raises(UnsupportedError) as raised:
        await collect(fusion, GenerationRequest(prompt=(1, 2)))
    assert raised.value.param == "prompt"
