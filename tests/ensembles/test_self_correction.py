from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import GenerationRequest, Grammar, Sampling, collect
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.ensembles.self_correction import SelfCorrection

CHAT = ({"role": "user", "content": "How much?"},)
METHOD = {"method": "self_correction"}


def ask(**changes: Any) -> GenerationRequest:
    return GenerationRequest(messages=CHAT, explain=True, **changes)


async def test_an_answer_that_is_found_right_is_the_reply(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "It is 18.", "9 * 2 = 18. Verdict: correct")
    answer = await collect(compose(METHOD, [ann]), ask())
    assert answer.text == "It is 18."
    assert answer.done.trace["stop"] == "found_right"
    assert [step["step"] for step in answer.done.trace["steps"]] == ["answer", "check"]
    assert answer.done.trace["steps"][1]["verdict"] is True
    assert (answer.done.usage.prompt_tokens, answer.done.usage.completion_tokens) == (20, 3 + 7)
    assert answer.done.turnout == 1


async def test_an_answer_that_is_found_wrong_is_written_anew(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "It is 17.", "9 * 2 is 18.\nVerdict: wrong", "It is 18.")
    answer = await collect(compose(METHOD, [ann]), ask())
    assert answer.text == "It is 18."
    assert (answer.done.trace["stop"], answer.done.trace["num_answers"]) == ("max_rounds", 2)
    assert "## Check 1\n\n9 * 2 is 18.\nVerdict: wrong" in answer.choices[0].reasoning
    first, check, rewrite = (request.messages for request in ann.requests)
    assert first == CHAT
    assert [message["role"] for message in check] == ["user", "assistant", "user"]
    assert check[1]["content"] == "It is 17."
    assert [message["content"] for message in rewrite[1:4:2]] == ["It is 17.", "9 * 2 is 18.\nVerdict: wrong"]
    assert rewrite[-1]["content"].startswith("According to this check the answer is wrong.")


async def test_a_raw_prompt_is_followed_by_the_same_as_text(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", " 17.", "Verdict: wrong", " 18.")
    answer = await collect(compose(METHOD, [ann]), GenerationRequest(prompt="9 * 2 ="))
    assert answer.text == " 18."
    assert ann.requests[1].prompt.startswith("9 * 2 = 17.\n\nCheck the answer above")
    assert "Verdict: wrong\n\nAccording to this check" in ann.requests[2].prompt
    assert answer.done.trace is None


async def test_rounds_go_on_until_the_answer_is_found_right(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "16", "Verdict: wrong", "17", "Verdict: wrong", "18", "Verdict: correct")
    method = compose(METHOD | {"max_rounds": 4}, [ann])
    answer = await collect(method, ask())
    assert (answer.text, answer.done.trace["stop"], len(ann.requests)) == ("18", "found_right", 6)
    assert method.num_calls() == 9
    again = await collect(
        compose(METHOD, [talker("ann", "16", "Verdict: wrong", "17")]), ask(overrides={"max_rounds": 1})
    )
    assert again.text == "17"


async def test_a_check_without_a_verdict_leaves_the_answer(talker: Callable, compose: Callable) -> None:
    answer = await collect(compose(METHOD, [talker("ann", "18", "Hm.")]), ask())
    assert (answer.text, answer.done.trace["stop"]) == ("18", "no_verdict")


async def test_thoughts_are_neither_checked_nor_take_part_in_the_verdict(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "<think>17?</think>It is 18.", "<think>Verdict: wrong</think>Verdict: correct")
    answer = await collect(compose(METHOD, [ann]), ask())
    assert answer.text == "<think>17?</think>It is 18."
    assert answer.done.trace["stop"] == "found_right"
    assert ann.requests[1].messages[1]["content"] == "It is 18."


async def test_a_member_that_falls_silent_later_leaves_its_last_answer(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "17", "Verdict: wrong", MemberError("ann", "gone"))
    answer = await collect(compose(METHOD, [ann]), ask())
    assert (answer.text, answer.done.trace["stop"]) == ("17", "silent")
    assert answer.done.trace["steps"][2] == {"step": "answer", "round": 1, "silent": "member 'ann': gone"}
    with pytest.raises(MemberError, match="gone"):
        await collect(compose(METHOD, [talker("ann", MemberError("ann", "gone"))]), ask())


async def test_a_budget_of_tokens_bounds_all_that_is_written(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "one two three", "Verdict: wrong", "never asked")
    answer = await collect(compose(METHOD | {"token_budget": 5}, [ann]), ask())
    assert (answer.text, answer.done.trace["stop"]) == ("one two three", "token_budget")
    assert [request.sampling.max_tokens for request in ann.requests] == [5, 2]


async def test_the_form_of_the_reply_does_not_bind_the_check(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "17", "Verdict: wrong", "18")
    sampling = Sampling(seed=5, stop=("\n",), grammar=Grammar("regex", r"\d+"), temperature=0.5)
    await collect(compose(METHOD | {"temperature": 0.1}, [ann]), ask(sampling=sampling))
    samplings = [request.sampling for request in ann.requests]
    assert [(s.grammar is None, s.stop) for s in samplings] == [(False, ("\n",)), (True, ()), (False, ("\n",))]
    assert {s.temperature for s in samplings} == {0.1}
    assert len({s.seed for s in samplings}) == 3


async def test_a_deadline_ends_the_checks(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "17", "Verdict: wrong", "18", delay_s=0.15)
    answer = await collect(compose(METHOD | {"max_rounds": 5}, [ann]), ask(deadline_s=0.2))
    assert answer.text == "17"
    assert answer.done.trace["stop"] in ("silent", "time")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"members": ["ann", "bob"]}, "one model with itself, got 2 members; take exchange_of_thought"),
        ({"members": {"ann": 0}}, "min_turnout|above zero"),
        ({"members": ["ann"], "max_rounds": 0}, "max_rounds"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        SelfCorrection.Config.model_validate(METHOD | config)
