from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import Delta, GenerationRequest, MemberUsage, Sampling, collect
from ensemble_server.ensembles.errors import MemberError, RequestError, TurnoutError, UnsupportedError
from ensemble_server.ensembles.registry import method_class

REQUEST = GenerationRequest(messages=({"role": "user", "content": "How many cats?"},), explain=True)
SEEDED = replace(REQUEST, sampling=Sampling(seed=1))
NUMBER = {"method": "majority", "samples": 1, "answer": "number"}
FOREVER = float("inf")


async def test_the_most_frequent_value_wins_and_the_reply_is_a_members_text(
    talker: Callable, compose: Callable
) -> None:
    members = [talker("ann", "It is 17."), talker("bob", "So $18.00"), talker("cas", r"\boxed{18}")]
    answer = await collect(compose(NUMBER, members), SEEDED)
    assert answer.text == "So $18.00"
    trace = answer.done.trace
    assert (trace["answer"], trace["votes"]) == ("18", {"17": 1.0, "18": 2.0})
    assert trace["agreement"] == pytest.approx(2 / 3)
    assert [candidate["answer"] for candidate in trace["candidates"]] == ["17", "18", "18"]
    assert trace["samples_saved"] == 0
    json.dumps(trace, allow_nan=False)


async def test_samples_of_one_member_vote(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "8", "7", "7", "8", "8")
    answer = await collect(compose(NUMBER | {"samples": 5}, [ann]), SEEDED)
    assert answer.text == "8"
    assert len({request.sampling.seed for request in ann.requests}) == 5


async def test_ties_go_to_the_answer_given_first(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "none"), talker("bob", "8"), talker("cas", "7"), talker("dan", "7"), talker("eve", "8")]
    assert (await collect(compose(NUMBER, members), SEEDED)).text == "8"


async def test_the_rest_is_cancelled_once_the_winner_is_decided(talker: Callable, compose: Callable) -> None:
    quick = [talker(name, "it is 7") for name in ("ann", "bob", "cas")]
    stuck = [talker(name, "8", delay_s=FOREVER) for name in ("dan", "eve")]
    answer = await collect(compose(NUMBER, quick + stuck), REQUEST)
    assert answer.text == "it is 7"
    assert answer.done.trace["samples_saved"] == 2
    assert [member.num_running for member in stuck] == [0, 0]
    assert answer.done.turnout == 3
    assert answer.done.usage.members["ann"] == MemberUsage(10, 3)
    assert answer.done.usage.members["dan"] == MemberUsage()


async def test_without_a_seed_late_samples_need_not_be_waited_for(talker: Callable, compose: Callable) -> None:
    stuck = talker("ann", "8", delay_s=FOREVER)
    quick = [talker(name, "7") for name in ("bob", "cas", "dan")]
    answer = await collect(compose(NUMBER, [stuck, *quick]), REQUEST)
    assert (answer.text, answer.done.trace["samples_saved"]) == ("7", 1)


async def test_with_a_seed_samples_count_in_their_order_so_the_text_repeats(
    talker: Callable, compose: Callable
) -> None:
    slow = talker("ann", "seven: 7", delay_s=0.05)
    quick = [talker(name, f"{name} says 7") for name in ("bob", "cas")]
    assert (await collect(compose(NUMBER, [slow, *quick]), SEEDED)).text == "seven: 7"
    assert (await collect(compose(NUMBER, [slow, *quick]), REQUEST)).text == "bob says 7"


async def test_early_stop_can_be_turned_off(talker: Callable, compose: Callable) -> None:
    members = [talker(name, "7") for name in ("ann", "bob", "cas", "dan")]
    answer = await collect(compose(NUMBER | {"early_stop": False}, members), SEEDED)
    assert answer.done.trace["votes"] == {"7": 4.0}
    assert answer.done.trace["samples_saved"] == 0


async def test_the_turnout_is_waited_for_before_stopping_early(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "7"), talker("bob", "7"), talker("cas", "8", delay_s=0.05)]
    answer = await collect(compose(NUMBER | {"min_turnout": 3}, members), REQUEST)
    assert answer.done.turnout == 3
    assert answer.done.trace["samples_saved"] == 0


async def test_weights_count_and_silent_members_abstain(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "8"), talker("bob", "7"), talker("cas", MemberError("cas", "gone")), talker("dan", "8")]
    config = NUMBER | {"members": {"ann": 1, "bob": 5, "cas": 1, "dan": 1}, "early_stop": False}
    answer = await collect(compose(config, members), SEEDED)
    assert answer.text == "7"
    assert answer.done.turnout == 3
    assert answer.done.trace["silent"][0]["member"] == "cas"


async def test_too_small_a_turnout_is_an_error(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "8"), talker("cas", MemberError("cas", "gone"))]
    with pytest.raises(TurnoutError, match="cas"):
        await collect(compose(NUMBER | {"min_turnout": 2}, members), REQUEST)


async def test_without_any_answer_the_first_text_is_the_reply(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", ""), talker("bob", "no idea"), talker("cas", "nor I")]
    answer = await collect(compose(NUMBER, members), SEEDED)
    assert answer.text == "no idea"
    assert answer.done.trace["answer"] is None
    assert answer.done.trace["agreement"] == 0


@pytest.mark.parametrize(
    ("kind", "texts", "reply"),
    [
        ("choice", ["The answer is (B).", "C", "b)"], "The answer is (B)."),
        ("yes_no", ["No", "It is true.", "yes"], "It is true."),
        ("text", ["London", "paris.", "The answer is Paris"], "paris."),
    ],
)
async def test_every_kind_of_answer(talker: Callable, compose: Callable, kind: str, texts: list, reply: str) -> None:
    members = [talker(f"m{index}", text) for index, text in enumerate(texts)]
    answer = await collect(compose(NUMBER | {"answer": kind}, members), SEEDED)
    assert answer.text == reply


async def test_reply_is_one_delta_and_several_choices_are_counts_of_their_own(
    talker: Callable, compose: Callable
) -> None:
    majority = compose(NUMBER, [talker("ann", lambda request: f"{request.sampling.seed} is 7", finish_reason="length")])
    events = [event async for event in majority.generate(SEEDED)]
    assert isinstance(events[0], Delta)
    assert events[0].finish_reason == "length"
    two = await collect(majority, replace(SEEDED, n=2))
    assert two.choices[0].text == events[0].text
    assert two.choices[1].text != events[0].text


async def test_request_may_change_how_is_counted(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "yes", "7 no")
    changed = replace(SEEDED, overrides={"samples": 2, "answer": "yes_no", "early_stop": False})
    trace = (await collect(compose(NUMBER, [ann]), changed)).done.trace
    assert trace["votes"] == {"yes": 1.0, "no": 1.0}
    with pytest.raises(RequestError, match=r"ensemble\.answer"):
        await collect(compose(NUMBER, [ann]), replace(SEEDED, overrides={"answer": "colour"}))
    with pytest.raises(UnsupportedError, match="majority"):
        await collect(compose(NUMBER, [ann]), replace(SEEDED, top_logprobs=2))


def test_wrong_configs_are_refused() -> None:
    with pytest.raises(ValidationError, match="yes_no"):
        method_class("majority").Config.model_validate(NUMBER | {"members": ["ann"], "answer": "colour"})
