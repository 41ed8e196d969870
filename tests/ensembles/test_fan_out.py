from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from ensemble_server.ensembles.base import GenerationRequest, MemberUsage, Usage
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    DeadlineError,
    EngineDeadError,
    MemberError,
    OverloadedError,
    RequestError,
    TurnoutError,
)
from ensemble_server.ensembles.fan_out import Call, FanOut, answered_members, fan_out, silent_members, total_usage

REQUEST = GenerationRequest(prompt="hello")
FOREVER = float("inf")


def calls(*talkers: object) -> list[Call]:
    return [Call(talker.name, talker, REQUEST) for talker in talkers]


async def test_outcomes_come_in_the_calls_order_though_the_first_is_slowest(talker: Callable) -> None:
    ann, bob = talker("ann", "slow words", delay_s=0.05), talker("bob", "quick")
    outcomes = await fan_out(calls(ann, bob), ensemble="crowd")
    assert [outcome.answer.text for outcome in outcomes] == ["slow words", "quick"]
    assert [outcome.reason for outcome in outcomes] == [None, None]


@pytest.mark.parametrize(("at_once", "expected"), [(10, 10), (3, 3)])
async def test_calls_run_at_the_same_time_and_no_more_of_them_than_allowed(
    talker: Callable, at_once: int, expected: int
) -> None:
    ann = talker("ann", "x", delay_s=0.01)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, ann.num_running)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    outcomes = await fan_out([Call("ann", ann, REQUEST, k) for k in range(10)], ensemble="crowd", at_once=at_once)
    watching.cancel()
    assert len(outcomes) == 10
    assert most == expected


async def test_time_spent_waiting_for_a_turn_counts_towards_the_deadline(talker: Callable) -> None:
    ann = talker("ann", "x", delay_s=0.15)
    calls = [Call("ann", ann, REQUEST, k) for k in range(3)]
    outcomes = await fan_out(calls, ensemble="crowd", at_once=1, deadline_s=0.25)
    assert [outcome.answer is None for outcome in outcomes] == [False, True, True]
    assert ann.requests[1].deadline_s < 0.12


async def test_failing_and_empty_and_stalling_members_are_silent_with_their_reasons(talker: Callable) -> None:
    members = [
        talker("ann", "words"),
        talker("bob", MemberError("bob", "gpu on fire")),
        talker("cas", "  \n"),
        talker("dan", "late", delay_s=FOREVER),
    ]
    outcomes = await fan_out(calls(*members), ensemble="crowd", deadline_s=0.1)
    assert answered_members(outcomes) == ("ann",)
    assert silent_members(outcomes) == {
        "bob": "member 'bob': gpu on fire",
        "cas": "member 'cas': the answer is empty",
        "dan": "member 'dan': no answer within 0.1 s",
    }
    assert members[3].num_running == 0


async def test_turnout_below_the_minimum_names_the_silent(talker: Callable) -> None:
    members = [talker("ann", "words"), talker("bob", MemberError("bob", "gone")), talker("cas", "")]
    with pytest.raises(TurnoutError, match=r"min_turnout is 2 \(bob: .*gone; cas: .*empty\)") as caught:
        await fan_out(calls(*members), ensemble="crowd", min_turnout=2)
    assert set(caught.value.silent) == {"bob", "cas"}
    assert caught.value.__cause__ is not None


async def test_a_lost_turnout_cancels_the_members_that_still_run(talker: Callable) -> None:
    stuck = talker("ann", "words", delay_s=FOREVER)
    with pytest.raises(TurnoutError):
        await fan_out(calls(stuck, talker("bob", MemberError("bob", "gone"))), ensemble="crowd", min_turnout=2)
    assert (stuck.num_running, stuck.num_broken_off) == (0, 1)


async def test_one_answered_sample_makes_a_member_count(talker: Callable) -> None:
    ann = talker("ann", MemberError("ann", "hiccup"), "words")
    outcomes = await fan_out([Call("ann", ann, REQUEST, k) for k in range(2)], ensemble="crowd")
    assert [outcome.answer is None for outcome in outcomes] == [True, False]
    assert silent_members(outcomes) == {}


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthError("too long", param="messages"),
        OverloadedError("full", retry_after_s=3),
        EngineDeadError("gone"),
    ],
)
async def test_a_ground_that_all_share_and_that_is_not_the_member_is_raised_as_it_is(
    talker: Callable, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught:
        await fan_out(calls(talker("ann", error), talker("bob", error)), ensemble="crowd")
    assert caught.value is error


async def test_all_members_past_the_deadline_is_a_deadline_error(talker: Callable) -> None:
    members = [talker(name, "x", delay_s=FOREVER) for name in ("ann", "bob")]
    with pytest.raises(DeadlineError):
        await fan_out(calls(*members), ensemble="crowd", deadline_s=0.05)


async def test_mixed_grounds_are_a_turnout_error(talker: Callable) -> None:
    members = [talker("ann", RequestError("bad")), talker("bob", MemberError("bob", "gone"))]
    with pytest.raises(TurnoutError):
        await fan_out(calls(*members), ensemble="crowd")


async def test_members_are_told_to_stop_before_they_are_cut_off(talker: Callable) -> None:
    ann = talker("ann", "x")
    await fan_out(calls(ann), ensemble="crowd", deadline_s=10.0)
    assert ann.requests[0].deadline_s == pytest.approx(9.5, abs=0.2)
    await fan_out([Call("ann", ann, GenerationRequest(prompt="p", deadline_s=2.0))], ensemble="crowd", deadline_s=10.0)
    assert ann.requests[1].deadline_s == 2.0
    await fan_out(calls(ann), ensemble="crowd")
    assert ann.requests[2].deadline_s is None


async def test_leaving_the_block_early_cancels_the_rest_and_keeps_their_usage(talker: Callable) -> None:
    quick, stuck = talker("ann", "one two"), talker("bob", "never", delay_s=FOREVER)
    async with FanOut(calls(stuck, quick), ensemble="crowd") as running:
        async for outcome in running:
            assert outcome.call.member == "ann"
            break
    assert (stuck.num_running, stuck.num_broken_off) == (0, 1)
    assert running.usage() == Usage(10, 2, {"ann": MemberUsage(10, 2), "bob": MemberUsage()})


async def test_a_client_that_leaves_cancels_every_member(talker: Callable) -> None:
    members = [talker(name, "x", delay_s=FOREVER) for name in ("ann", "bob")]
    task = asyncio.create_task(fan_out(calls(*members), ensemble="crowd"))
    while not all(member.num_running for member in members):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [member.num_running for member in members] == [0, 0]


async def test_a_fault_of_ours_is_raised_and_cancels_the_rest(talker: Callable) -> None:
    stuck = talker("ann", "x", delay_s=FOREVER)
    with pytest.raises(ZeroDivisionError):
        await fan_out(calls(stuck, talker("bob", ZeroDivisionError("oops"))), ensemble="crowd")
    assert stuck.num_running == 0


def test_usage_adds_up_by_name() -> None:
    inner = Usage(20, 4, {"ann": MemberUsage(10, 2, 0.5), "bob": MemberUsage(10, 2)})
    outer = Usage(10, 1, {"ann": MemberUsage(10, 1, 0.25)})
    assert total_usage([inner, outer]) == Usage(30, 5, {"ann": MemberUsage(20, 3, 0.75), "bob": MemberUsage(10, 2)})


class Watching:
    def __init__(self) -> None:
        self.silences: list[tuple[str, str, float]] = []

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        self.silences.append((ensemble, member, after_s))

    def chose(self, ensemble: str, took_s: float) -> None:
        raise AssertionError("nothing is chosen here")


async def test_whoever_watches_the_request_hears_of_silent_calls_and_how_long_they_were_waited_for(
    talker: Callable,
) -> None:
    watch = Watching()
    asked = replace(REQUEST, watch=watch)
    late, ann = talker("late", "never", delay_s=FOREVER), talker("ann", "here")
    both = [Call(one.name, one, asked) for one in (late, ann)]
    await fan_out(both, ensemble="crowd", deadline_s=0.05)
    [(ensemble, member, after_s)] = watch.silences
    assert (ensemble, member) == ("crowd", "late")
    assert after_s >= 0.05
    assert asked == REQUEST, "who watches is no part of what is asked"
