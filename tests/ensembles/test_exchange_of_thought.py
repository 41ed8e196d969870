from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import Answer, Delta, GenerationRequest, MemberUsage, Sampling, collect
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    DeadlineError,
    MemberError,
    ModelLoadError,
    RequestError,
    TurnoutError,
    UnsupportedError,
)
from ensemble_server.ensembles.exchange.agreement import replay
from ensemble_server.ensembles.exchange.transcript import Transcript
from ensemble_server.ensembles.exchange_of_thought import ExchangeOfThought
from ensemble_server.ensembles.method import Services

FOREVER = float("inf")
QUESTION = ({"role": "user", "content": "How many kittens?"},)
TALK = {"method": "exchange_of_thought", "answer": "number"}


def ask(**changes: Any) -> GenerationRequest:
    return GenerationRequest(messages=QUESTION, explain=True, **changes)


def transcript_of(answer: Answer) -> Transcript:
    """As it comes back from JSON; every one must replay to itself."""
    transcript = Transcript.model_validate_json(json.dumps(answer.done.trace))
    assert replay(transcript) == (list(transcript.states), [])
    return transcript


def answers_of(transcript: Transcript) -> list[dict[str, str | None]]:
    return [{name: reply.answer for name, reply in round_.replies.items()} for round_ in transcript.rounds]


# --- rounds -------------------------------------------------------------------------------------------------------


async def test_participants_exchange_until_they_agree(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "I say 18", "still 18")
    bob = talker("bob", "I say 20", "now 18")
    answer = await collect(compose(TALK, [ann, bob]), ask())
    assert answer.text == "still 18"
    assert answers_of(transcript_of(answer)) == [{"ann": "18", "bob": "20"}, {"ann": "18", "bob": "18"}]
    assert (answer.done.method, answer.done.members, answer.done.turnout) == ("exchange_of_thought", ("ann", "bob"), 2)
    assert answer.done.usage.members == {"ann": MemberUsage(20, 5), "bob": MemberUsage(20, 5)}
    assert (answer.done.usage.prompt_tokens, answer.done.usage.completion_tokens) == (40, 10)


async def test_agreement_on_everyones_own_answer_costs_one_call_each(talker: Callable, compose: Callable) -> None:
    ann, bob, cas = talker("ann", "18"), talker("bob", "$18.00"), talker("cas", "It is 18 kittens.")
    answer = await collect(compose(TALK, [ann, bob, cas]), ask())
    assert [len(member.requests) for member in (ann, bob, cas)] == [1, 1, 1]
    assert ann.requests[0].messages == QUESTION
    assert transcript_of(answer).states[-1].stop == "unanimity"


@pytest.mark.parametrize(
    ("topology", "heard"),
    [
        ("memory", {"ann": {"bob", "cas"}, "bob": {"ann", "cas"}, "cas": {"ann", "bob"}}),
        ("report", {"ann": {"bob", "cas"}, "bob": {"ann"}, "cas": {"ann"}}),
        ("relay", {"ann": {"cas"}, "bob": {"ann"}, "cas": {"bob"}}),
        ("debate", {"ann": {"bob", "cas"}, "bob": {"cas"}, "cas": {"bob"}}),
        ({"cas": ["ann"]}, {"ann": None, "bob": None, "cas": {"ann"}}),
    ],
)
async def test_everyone_reads_the_solutions_of_whom_it_hears_and_its_own(
    talker: Callable, compose: Callable, topology: Any, heard: dict[str, set[str] | None]
) -> None:
    members = [talker(name, f"{name} thinks {number}") for name, number in (("ann", 1), ("bob", 2), ("cas", 3))]
    await collect(compose({**TALK, "topology": topology, "max_rounds": 1}, members), ask())
    for member in members:
        assert len(member.requests) == (1 if heard[member.name] is None else 2)
        for request in member.requests[1:]:
            *question, own, prompt = request.messages
            assert tuple(question) == QUESTION
            assert own == {"role": "assistant", "content": member.speeches[0]}
            assert {name for name in ("ann", "bob", "cas") if f"{name}'s solution" in prompt["content"]} == heard[
                member.name
            ]


async def test_confidence_is_told_from_the_second_exchange_on(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1", "2", "2"), talker("bob", "3", "3", "3")
    await collect(compose({**TALK, "max_rounds": 2}, [ann, bob]), ask())
    first, second = (request.messages[-1]["content"] for request in bob.requests[1:])
    assert "confidence" not in first
    assert "ann's confidence: 0.50" in second
    assert "bob's confidence: 1.00" in ann.requests[2].messages[-1]["content"]


async def test_rounds_are_synchronous(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1", "2", "3"), talker("bob", "4", "5", "6", delay_s=0.05)
    await collect(compose({**TALK, "max_rounds": 2, "stop": "never"}, [ann, bob]), ask())
    read = [request.messages[-1]["content"] for request in ann.requests[1:]]
    assert ["bob's solution:\n4" in read[0], "bob's solution:\n5" in read[1]] == [True, True]


async def test_rounds_stream_as_reasoning_and_the_reply_as_text(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "one 1", "two 2"), talker("bob", "two 2", "two 2")
    deltas = [event async for event in compose(TALK, [ann, bob]).generate(ask()) if isinstance(event, Delta)]
    assert [bool(delta.reasoning) for delta in deltas] == [True, True, False]
    assert deltas[0].reasoning.startswith("## Round 0\n\n**ann** (answer 1, confidence 1.00): one 1\n\n**bob**")
    assert "Stopped by unanimity with the answer 2, in the words of bob." in deltas[1].reasoning
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", None), ("", None), ("two 2", "stop")]


async def test_who_repeats_leaves_and_is_not_called_again(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "2", "3", "1", "1")
    answer = await collect(compose({**TALK, "stop": "repeat", "max_rounds": 9}, [ann, bob]), ask())
    assert (len(ann.requests), len(bob.requests)) == (2, 4)
    state = transcript_of(answer).states[-1]
    assert (state.stop, state.answer, state.votes) == ("all_left", "1", {"1": 1.5})


async def test_never_stopping_runs_all_rounds(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "1")
    answer = await collect(compose({**TALK, "stop": "never", "max_rounds": 4}, [ann, bob]), ask())
    assert transcript_of(answer).states[-1].stop == "max_rounds"
    assert len(ann.requests) == 5


async def test_raw_prompts_are_exchanged_as_raw_prompts(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", " 1"), talker("bob", " 2")
    await collect(compose({**TALK, "max_rounds": 1}, [ann, bob]), GenerationRequest(prompt="Q: How many?\nA:"))
    assert [request.messages for request in ann.requests] == [None, None]
    assert ann.requests[0].prompt == "Q: How many?\nA:"
    assert ann.requests[1].prompt.startswith("Q: How many?\nA: 1\n\nHere is what others answered")


# --- participants -------------------------------------------------------------------------------------------------


async def test_one_model_takes_part_under_several_personas(talker: Callable, compose: Callable) -> None:
    model = talker("base", "1")
    roles = {
        "kitty": {"model": "base", "persona": "You are Kitty."},
        "ben": {"model": "base", "persona": "You are Ben."},
        "peter": {"model": "base", "weight": 2},
    }
    config = {**TALK, "participants": roles, "members": None}
    talk = compose(config, [model])
    assert talk.config.references() == {"base"}
    answer = await collect(talk, ask(sampling=Sampling(seed=1)))
    assert answer.done.members == ("kitty", "ben", "peter")
    systems = [request.messages[0] for request in model.requests]
    assert [message["content"] for message in systems] == ["You are Kitty.", "You are Ben.", "How many kittens?"]
    assert len({request.sampling.seed for request in model.requests}) == 3
    assert transcript_of(answer).states[-1].votes == {"1": 4.0}
    assert answer.done.usage.members == {"base": MemberUsage(30, 3)}


async def test_members_of_weight_zero_take_no_part(talker: Callable, compose: Callable) -> None:
    ann, bob, cas = talker("ann", "1"), talker("bob", "1"), talker("cas", "1")
    await collect(compose({**TALK, "members": {"ann": 1, "bob": 0, "cas": 2}}, [ann, bob, cas]), ask())
    assert [len(member.requests) for member in (ann, bob, cas)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"members": ["ann"]}, "at least two participants, got 1"),
        ({"members": {"ann": 1, "bob": -1}}, "'bob' has -1"),
        ({"members": ["ann", "bob"], "participants": {"x": {"model": "ann"}}}, "either `members` or `participants`"),
        ({"participants": {"x": {"model": "ann"}}}, "at least two participants"),
        ({"members": ["ann", "bob"], "topology": {"ann": ["bo"]}}, "did you mean 'bob'"),
        ({"members": ["ann", "bob"], "topology": "ring"}, "topology"),
        ({"members": ["ann", "bob"], "stop": "sometimes"}, "stop"),
        ({"members": ["ann", "bob"], "answer": "number", "text_threshold": 0.9}, "answer is 'number'"),
        ({"members": ["ann", "bob"], "min_turnout": 3}, "there are 2 participants"),
        ({"members": ["ann", "bob"], "token_budget": 1}, "not one token for each"),
        ({"members": ["ann", "bob"], "rounds": 3}, "rounds"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ExchangeOfThought.Config.model_validate({"method": "exchange_of_thought", **config})


# --- text answers -------------------------------------------------------------------------------------------------


async def test_text_answers_are_the_same_but_for_spelling(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "The Eiffel Tower."), talker("bob", "eiffel tower")
    answer = await collect(compose({"method": "exchange_of_thought"}, [ann, bob]), ask())
    assert transcript_of(answer).states[-1].stop == "unanimity"


async def test_text_answers_are_the_same_from_a_cosine_on(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "abba"), talker("bob", "bababab")  # letters: (2, 2) and (3, 4), cosine 0.99
    config = {"method": "exchange_of_thought", "max_rounds": 1}
    loose = await collect(compose({**config, "text_threshold": 0.95}, [ann, bob]), ask())
    assert answers_of(transcript_of(loose)) == [{"ann": "abba", "bob": "abba"}]
    strict = await collect(compose({**config, "text_threshold": 0.999}, [ann, bob]), ask())
    assert transcript_of(strict).states[0].stop is None


def test_a_cosine_without_an_embedding_model_is_refused_at_load(talker: Callable) -> None:
    config = ExchangeOfThought.Config(method="exchange_of_thought", members=["a", "b"], text_threshold=0.9)
    models = {name: talker(name, "x") for name in ("a", "b")}
    with pytest.raises(ModelLoadError, match="'talk': text_threshold needs an embedding model"):
        ExchangeOfThought("talk", config, models, Services())


# --- members that fail --------------------------------------------------------------------------------------------


async def test_a_silent_participant_is_dropped_and_told(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "2")
    cas = talker("cas", MemberError("cas", "gpu on fire"))
    answer = await collect(compose({**TALK, "max_rounds": 1}, [ann, bob, cas]), ask())
    assert answer.done.turnout == 2
    assert transcript_of(answer).rounds[0].silent == {"cas": "member 'cas': gpu on fire"}
    assert len(cas.requests) == 1
    assert "cas's solution" not in ann.requests[1].messages[-1]["content"]
    assert "**cas** is silent" in answer.choices[0].reasoning


async def test_falling_silent_later_leaves_the_last_word_standing(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "18", ContextLengthError("too long"))
    bob = talker("bob", "20", "18")
    answer = await collect(compose(TALK, [ann, bob]), ask())
    transcript = transcript_of(answer)
    assert transcript.states[-1].stop == "unanimity"
    assert (answer.text, answer.done.turnout) == ("18", 2)


async def test_too_few_at_the_start_is_an_error(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "1"), talker("bob", MemberError("bob", "down"))]
    with pytest.raises(TurnoutError, match=r"1 members answered, min_turnout is 2 \(bob: member 'bob': down\)"):
        await collect(compose({**TALK, "min_turnout": 2}, members), ask())


async def test_an_empty_extraction_abstains(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "no idea"), talker("bob", "18")
    answer = await collect(compose({**TALK, "max_rounds": 1}, [ann, bob]), ask())
    assert answers_of(transcript_of(answer))[0] == {"ann": None, "bob": "18"}
    assert answer.text == "18"


# --- budgets ------------------------------------------------------------------------------------------------------


async def test_the_token_budget_is_shared_and_stops_the_exchange(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "one two 3"), talker("bob", "one two 4")
    answer = await collect(compose({**TALK, "token_budget": 13, "max_rounds": 9}, [ann, bob]), ask())
    # 13 tokens: 6 each; 6 are written and 7 left: 3 each; 1 is left: not one for each
    assert [request.sampling.max_tokens for request in ann.requests] == [6, 3]
    assert transcript_of(answer).states[-1].stop == "token_budget"
    own = await collect(compose({**TALK, "token_budget": 13}, [ann, bob]), ask(sampling=Sampling(max_tokens=2)))
    assert ann.requests[-1].sampling.max_tokens == 2
    assert transcript_of(own)


async def test_time_runs_out_in_a_round_and_what_was_said_counts(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "18"), talker("bob", lambda request: "20" if len(request.messages) == 1 else "22")
    ann.delay_s = bob.delay_s = 0.2
    answer = await collect(compose({**TALK, "time_budget_s": 0.3, "max_rounds": 9}, [ann, bob]), ask())
    transcript = transcript_of(answer)
    assert [sorted(round_.silent) for round_ in transcript.rounds] == [[], ["ann", "bob"]]
    assert answer.text == "18"


async def test_a_deadline_before_any_answer_is_an_error(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "1", delay_s=FOREVER), talker("bob", "2", delay_s=FOREVER)]
    with pytest.raises(DeadlineError):
        await collect(compose(TALK, members), ask(deadline_s=0.05))


async def test_leaving_in_a_round_cancels_its_calls(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "2")
    async with aclosing(compose(TALK, [ann, bob]).generate(ask())) as events:
        await anext(events)
        ann.delay_s = bob.delay_s = FOREVER
        waiting = asyncio.create_task(anext(events))
        while ann.num_running + bob.num_running < 2:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert ann.num_running + bob.num_running == 0


# --- what requests may say ----------------------------------------------------------------------------------------


async def test_seeds_repeat_and_differ_by_participant_and_round(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "2")
    talk = compose({**TALK, "max_rounds": 1}, [ann, bob])
    for _ in range(2):
        await collect(talk, ask(sampling=Sampling(seed=7)))
    seeds = [request.sampling.seed for member in (ann, bob) for request in member.requests]
    assert seeds[:2] == seeds[2:4]
    assert len(set(seeds)) == 4


async def test_several_choices_are_several_exchanges(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "1"), talker("bob", "1")
    answer = await collect(compose(TALK, [ann, bob]), ask(n=2, sampling=Sampling(seed=7)))
    assert [choice.text for choice in answer.choices] == ["1", "1"]
    assert len({request.sampling.seed for request in ann.requests}) == 2
    assert all(Transcript.model_validate(trace) for trace in answer.done.trace["choices"])


async def test_a_request_may_change_the_rules(talker: Callable, compose: Callable) -> None:
    ann, bob, cas = talker("ann", "1"), talker("bob", "2"), talker("cas", "2")
    talk = compose(TALK, [ann, bob, cas])
    overrides = {"stop": "majority", "topology": "relay", "weights": {"ann": 1, "bob": 1, "cas": 1}}
    transcript = transcript_of(await collect(talk, ask(overrides=overrides)))
    assert (transcript.settings.topology, transcript.states[-1].stop) == ("relay", "majority")
    with pytest.raises(RequestError, match=r"ensemble\.max_rounds") as raised:
        await collect(talk, ask(overrides={"max_rounds": 0}))
    assert raised.value.param == "ensemble.max_rounds"
    with pytest.raises(RequestError, match=r"did you mean 'topology'"):
        await collect(talk, ask(overrides={"topologi": "relay"}))


async def test_logprobs_are_refused_by_name(talker: Callable, compose: Callable) -> None:
    with pytest.raises(UnsupportedError) as raised:
        await collect(compose(TALK, [talker("ann", "1"), talker("bob", "2")]), ask(top_logprobs=0))
    assert raised.value.param == "logprobs"


async def test_without_explain_there_is_no_trace(talker: Callable, compose: Callable) -> None:
    talk = compose(TALK, [talker("ann", "1"), talker("bob", "1")])
    assert (await collect(talk, GenerationRequest(messages=QUESTION))).done.trace is None


async def test_an_exchange_may_take_part_in_an_exchange(talker: Callable, compose: Callable) -> None:
    inner = compose(TALK, [talker("ann", "1"), talker("bob", "1")], name="inner")
    inner.name = "inner"
    answer = await collect(compose(TALK, [inner, talker("cas", "1")]), ask())
    transcript = transcript_of(answer)
    assert Transcript.model_validate(transcript.rounds[0].replies["inner"].trace).states[-1].answer == "1"
    assert set(answer.done.usage.members) == {"ann", "bob", "cas"}
