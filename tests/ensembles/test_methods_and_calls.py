"""What every method of texts does with members that call tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from ensemble_server.ensembles.answer_fusion import ABOUT_CALLS
from ensemble_server.ensembles.base import GenerationRequest, Sampling, ToolCall, collect
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.registry import method_class
from tests.ensembles.test_ranking import Judge

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
REQUEST = GenerationRequest(
    messages=({"role": "user", "content": "Umbrella in Oslo?"},),
    explain=True,
    tools=TOOLS,
    sampling=Sampling(seed=1),
)
OSLO = ToolCall("weather", '{"city": "Oslo", "days": 1}', "id_1")
OSLO_TOO = ToolCall("weather", '{"days": 1.0, "city": "Oslo"}', "id_2")
BERGEN = ToolCall("weather", '{"city": "Bergen", "days": 1}')
CANONICAL = 'weather({"city": "Oslo", "days": 1})'


async def test_majority_counts_equal_calls_as_one_answer(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", [BERGEN]), talker("bob", [OSLO]), talker("cas", "Yes."), talker("dan", [OSLO_TOO])]
    answer = await collect(compose({"method": "majority", "samples": 1}, members), REQUEST)
    assert answer.choices[0].calls == [OSLO]
    trace = answer.done.trace
    assert (trace["answer"], trace["votes"][CANONICAL]) == (CANONICAL, 2.0)
    assert trace["candidates"][1]["calls"] == [{"name": "weather", "arguments": OSLO.arguments}]
    assert "calls" not in trace["candidates"][2]
    json.dumps(trace, allow_nan=False)
    assert all(member.requests[0].tools == TOOLS for member in members)


async def test_majority_takes_a_text_over_scattered_calls(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", [BERGEN]), talker("bob", "Yes."), talker("cas", "yes"), talker("dan", [OSLO])]
    answer = await collect(compose({"method": "majority", "samples": 1}, members), REQUEST)
    assert (answer.text, answer.choices[0].calls) == ("Yes.", [])


@pytest.mark.parametrize("similarity", [["rouge_l_word"], ["embedding"], {"rouge_l_char": 1, "embedding": 1}])
async def test_a_crowd_votes_for_the_call_that_most_make(
    talker: Callable, compose: Callable, similarity: object
) -> None:
    members = [talker("ann", [BERGEN]), talker("bob", "Oslo is wet."), talker("cas", [OSLO]), talker("dan", [OSLO_TOO])]
    answer = await collect(compose({"method": "crowd_vote", "similarity": similarity}, members), REQUEST)
    assert answer.choices[0].calls == [OSLO]
    assert answer.done.trace["scores"][2:] == [pytest.approx(answer.done.trace["scores"][2])] * 2
    assert answer.done.trace["scores"][:2] == [0, 0]
    assert answer.done.trace["equal_texts"] == [[0], [1], [2, 3]]


async def test_a_judge_reads_calls(talker: Callable) -> None:
    bergen = 'weather({"city": "Bergen", "days": 1})'
    judge = Judge({CANONICAL: 2.0, bergen: 1.0, "No idea.": 0.0})
    members = [talker("ann", [BERGEN]), talker("bob", [OSLO]), talker("cas", "No idea."), talker("dan", [OSLO_TOO])]
    cls = method_class("ranking")
    config = cls.Config.model_validate(
        {"method": "ranking", "judge": "judge", "members": [member.name for member in members]}
    )
    ranking = cls("best", config, {model.name: model for model in (*members, judge)}, Services())
    answer = await collect(ranking, REQUEST)
    assert answer.choices[0].calls == [OSLO]
    assert judge.num_asked == 6  # the two equal calls are not compared


async def test_an_aggregator_reads_calls_and_decides(talker: Callable, compose: Callable) -> None:
    ann, bob, eve = talker("ann", [OSLO]), talker("bob", "Take one."), talker("eve", [OSLO])
    fusion = {"method": "answer_fusion", "members": ["ann", "bob"], "aggregator": "eve", "instruction": "Fuse."}
    answer = await collect(compose(fusion, [ann, bob, eve]), REQUEST)
    assert answer.choices[0].calls == [OSLO]
    [asked] = eve.requests
    assert asked.tools == TOOLS
    content = asked.messages[-1]["content"]
    assert content == f"Umbrella in Oslo?\n\nFuse. {ABOUT_CALLS}\n\n1. {CANONICAL}\n\n2. Take one."
    plain = await collect(compose(fusion, [talker("ann", "a"), bob, eve]), REQUEST)
    assert plain.choices[0].calls == [OSLO]
    assert ABOUT_CALLS not in eve.requests[-1].messages[-1]["content"]


async def test_an_exchange_agrees_on_equal_calls(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", [BERGEN], [OSLO]), talker("bob", [OSLO_TOO])
    answer = await collect(compose({"method": "exchange_of_thought"}, [ann, bob]), REQUEST)
    assert [call.name for call in answer.choices[0].calls] == ["weather"]
    rounds = answer.done.trace["rounds"]
    assert [round_["replies"]["ann"]["answer"] for round_ in rounds] == [CANONICAL.replace("Oslo", "Bergen"), CANONICAL]
    assert CANONICAL in ann.requests[1].messages[-1]["content"]


async def test_a_call_is_checked_and_corrected(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", [BERGEN], "Verdict: wrong", [OSLO], "Verdict: right")
    answer = await collect(compose({"method": "self_correction", "max_rounds": 2}, [ann]), REQUEST)
    assert answer.choices[0].calls[-1:] == answer.choices[0].calls
    assert answer.done.trace["steps"][0]["text"] == CANONICAL.replace("Oslo", "Bergen")
    assert [bool(request.tools) for request in ann.requests[:2]] == [True, False]


async def test_routing_passes_calls_through(talker: Callable, compose: Callable) -> None:
    routed = compose({"method": "routing", "members": {"ann": {"positive_prompts": ["rain"]}}}, [talker("ann", [OSLO])])
    answer = await collect(routed, replace(REQUEST, overrides={}))
    assert answer.choices[0].calls == [OSLO]


async def test_several_choices_keep_their_calls(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", [OSLO], [BERGEN]), talker("bob", [OSLO], [BERGEN])]
    answer = await collect(compose({"method": "majority", "samples": 1}, members), replace(REQUEST, n=2))
    assert sorted(choice.calls[0].arguments for choice in answer.choices) == [BERGEN.arguments, OSLO.arguments]
