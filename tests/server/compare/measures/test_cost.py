"""Timing with models that take a known time and fail on cue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, MemberUsage, Usage
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.compare.measures.cost import ForwardCounter, Prompts, as_record, measure_cost
from ensemble_server.server.compare.measures.cost_settings import CostSettings

SETTINGS = CostSettings(concurrency=(1, 3), max_tokens=4, prompt_tokens=2, repeats=2)


class Paced:
    """Answers after `seconds`; `log` gets its name at each request."""

    members = ("paced",)
    max_model_len = None
    explains_tokens, fan_out = True, 1

    def __init__(self, name: str, log: list[str], *, seconds: float = 0.0, fails: bool = False, ids: int = 4) -> None:
        self.name, self.log, self.seconds, self.fails, self.ids = name, log, seconds, fails, ids
        self.prompts: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.log.append(self.name)
        self.prompts.append(request.messages[0]["content"])
        if self.fails:
            raise MemberError(self.name, "broke")
        await asyncio.sleep(self.seconds)
        yield Delta(0, "four words are here", token_ids=tuple(range(self.ids)))
        yield Done(Usage(2, 4, {"far": MemberUsage(2, 4, cost=0.5)}), "member", (self.name,), 1)


def measured(*models: Paced, **options: object):
    return asyncio.run(
        measure_cost(
            {model.name: model for model in models},
            SETTINGS,
            "abcdefghijklmnopqrstuvwxyz" * 4,
            options.pop("counter", ForwardCounter()),
            lambda text: len(text.split()),
            **options,
        )
    )


def test_arms_take_turns_and_the_first_round_is_dropped():
    log: list[str] = []
    figures = measured(Paced("a", log), Paced("b", log))
    turns = [set(log[at : at + 2]) for at in range(0, 24, 8)], [log[at + 2 : at + 8] for at in range(0, 24, 8)]
    assert turns[0] == [{"a", "b"}] * 3 and all(
        turn in (["a"] * 3 + ["b"] * 3, ["b"] * 3 + ["a"] * 3) for turn in turns[1]
    )
    assert len({tuple(log[at : at + 8]) for at in range(0, 24, 8)}) > 1, "in another order"
    assert {key: len(values) for key, values in figures["a"].tokens_per_s.items()} == {"1": 2, "3": 2}
    assert len(figures["a"].ttft_s) == 2, "of single requests only"


def test_tokens_per_second_count_all_streams():
    figures = measured(Paced("a", [], seconds=0.05))["a"]
    assert figures.ttft_s[0] >= 0.05
    assert max(figures.tokens_per_s["1"]) <= 4 / 0.05 and max(figures.tokens_per_s["3"]) <= 12 / 0.05
    assert min(figures.tokens_per_s["3"]) > max(figures.tokens_per_s["1"])


def test_every_request_has_a_prompt_of_its_own_and_of_one_length():
    log: list[str] = []
    models = [Paced("a", log), Paced("b", log)]
    measured(*models)
    prompts = models[0].prompts + models[1].prompts
    assert len({len(prompt) for prompt in prompts}) == 1
    assert prompts[0] not in prompts[1:10]


def test_an_arm_that_fails_is_not_asked_again_and_the_others_go_on():
    log: list[str] = []
    figures = measured(Paced("bad", log, fails=True), Paced("good", log))
    assert "broke" in figures["bad"].error and log.count("bad") == 1
    assert figures["good"].error is None and len(figures["good"].tokens_per_s["1"]) == 2


def test_answers_without_token_ids_are_counted_by_their_text():
    assert measured(Paced("a", [], ids=0))["a"].answer_tokens == 2 * (1 + 3) * 4


def test_spend_and_forwards_of_remote_members_come_from_their_usage():
    figures = measured(Paced("a", []), remote=["far"])["a"]
    assert (figures.spend, figures.forward_tokens) == (2 * 4 * 0.5, 2 * 4 * 6)
    assert measured(Paced("a", []))["a"].forward_tokens == 0


def test_what_an_endpoint_keeps_to_itself_is_not_nothing():
    figures = measured(Paced("a", []), remote=["far"])["a"]
    known = {"inputs": "", "weights_bytes": None, "kv_bytes": None, "kv_tokens": 8}
    assert as_record(figures, **known).spend == 4.0 and as_record(figures, **known).forward_tokens_per_answer_token
    assert as_record(figures, **known, is_priced=False).spend is None
    figures.is_told = False
    assert as_record(figures, **known).forward_tokens_per_answer_token is None


def test_the_counter_adds_up_what_the_engine_forwarded():
    counter = ForwardCounter()
    counter(SimpleNamespace(num_tokens={"a": 3, "b": 4}))
    counter(SimpleNamespace(num_tokens={"a": 1}))
    assert counter.num_tokens == 8


@pytest.mark.parametrize("length", [3, 8, 100])
def test_prompts_wrap_around_a_short_text(length: int):
    prompts = Prompts("x" * length, 2)
    assert {len(prompts.next()) for _ in range(20)} == {min(8, length)}
