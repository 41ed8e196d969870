from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    MemberUsage,
    Mixture,
    TokenLogprob,
    Usage,
    collect,
)
from ensemble_server.ensembles.errors import MemberError, ModelLoadError, RequestError, TurnoutError, UnsupportedError
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.registry import method_class
from ensemble_server.server.weights.reranking import CrossEncoderReranker

REQUEST = GenerationRequest(
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the cat?"}),
    explain=True,
)
BY_JUDGE = {"method": "ranking", "judge": "judge"}


@dataclass
class Judge:
    """Likes the answer of higher worth, and the first place a little. Gives a real judge's single token."""

    worth: Mapping[str, float]
    lean: float = 0.0
    fails_on: tuple[str, ...] = ()
    delay_s: float = 0.0
    name: str = "judge"
    members: tuple[str, ...] = ("judge",)
    max_model_len: int | None = None
    host: object = None
    mixture: Mixture = field(default_factory=lambda: Mixture({"judge": 1.0}))
    num_asked: int = 0
    explains_tokens: bool = True
    fan_out: int = 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.num_asked += 1
        text = request.messages[0]["content"] if request.messages else request.prompt
        first, second = text.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
        second = second.split("\n\nWhich")[0]
        await asyncio.sleep(self.delay_s)
        if first in self.fails_on or second in self.fails_on:
            raise MemberError(self.name, "cannot read that")
        logit = self.worth[first] - self.worth[second] + self.lean
        a = 1 / (1 + math.exp(-logit))
        tokens = [TokenLogprob(1, "A", b"A", math.log(a)), TokenLogprob(2, "B", b"B", math.log(1 - a))]
        chosen = replace(max(tokens, key=lambda token: token.logprob), top=tuple(tokens))
        yield Delta(0, chosen.text, (chosen.token_id,), (chosen,), finish_reason="length")
        yield Done(Usage(50, 1, {self.name: MemberUsage(50, 1)}), "member", self.members, 1)


@dataclass
class Scored:
    """A member that gives the log-probabilities of its tokens."""

    name: str
    text: str
    logprobs: tuple[float, ...]
    members: tuple[str, ...] = ()
    max_model_len: int | None = None
    explains_tokens: bool = True
    fan_out: int = 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        assert request.top_logprobs == 0
        tokens = tuple(TokenLogprob(0, "x", b"x", logprob) for logprob in self.logprobs)
        yield Delta(0, self.text, tuple(range(len(tokens))), tokens, finish_reason="stop")
        yield Done(Usage(1, len(tokens)), "member", (self.name,), 1)


def ranking(config: Mapping, models: list, services: Services | None = None) -> object:
    cls = method_class("ranking")
    members = [model.name for model in models if model.name != "judge"]
    parsed = cls.Config.model_validate({"method": "ranking", "members": members} | config)
    return cls("best", parsed, {model.name: model for model in models}, services or Services())


async def test_the_judges_favourite_is_the_reply(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 2.0, "fair": 1.0})
    best = ranking(BY_JUDGE, [talker("ann", "bad"), talker("bob", "good"), talker("cas", "fair"), judge])
    answer = await collect(best, REQUEST)
    assert answer.text == "good"
    trace = answer.done.trace
    # logistic of the differences of worth, by hand: good over fair 1 / (1 + e^-1), good over bad 1 / (1 + e^-2)
    assert trace["preferences"][1] == pytest.approx([1 / (1 + math.e**-2), 0.5, 1 / (1 + math.e**-1)])
    assert trace["scores"][1] == pytest.approx(1 / (1 + math.e**-2) + 1 / (1 + math.e**-1))
    assert trace["ranking"] == [1, 2, 0]
    assert (trace["num_judgements"], judge.num_asked) == (6, 6)
    assert trace["place_bias"] == pytest.approx(0)
    json.dumps(trace, allow_nan=False)


async def test_a_judge_that_leans_to_the_first_place_is_asked_both_ways_round(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 0.1}, lean=3.0)
    answer = await collect(ranking(BY_JUDGE, [talker("ann", "bad"), talker("bob", "good"), judge]), REQUEST)
    assert answer.text == "good"
    assert answer.done.trace["place_bias"] > 0.4


async def test_equal_answers_are_not_compared(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 1.0})
    members = [talker("ann", "good"), talker("bob", "bad"), talker("cas", "good")]
    answer = await collect(ranking(BY_JUDGE, [*members, judge]), REQUEST)
    assert judge.num_asked == 2
    assert answer.done.trace["ties"] == [[0, 2]]
    assert answer.done.trace["preferences"][0][2] == 0.5


async def test_a_lone_answer_needs_no_judge(talker: Callable) -> None:
    judge = Judge({})
    answer = await collect(ranking(BY_JUDGE, [talker("ann", "only"), talker("bob", ""), judge]), REQUEST)
    assert (answer.text, judge.num_asked, answer.done.turnout) == ("only", 0, 1)


async def test_usage_has_the_judges_tokens_too(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good one": 1.0})
    done = (await collect(ranking(BY_JUDGE, [talker("ann", "bad"), talker("bob", "good one"), judge]), REQUEST)).done
    assert done.usage.members["judge"] == MemberUsage(100, 2)
    assert done.usage.prompt_tokens == 10 + 10 + 100
    assert done.members == ("ann", "bob")


async def test_a_comparison_that_fails_is_a_draw(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 1.0, "odd": 9.0}, fails_on=("odd",))
    members = [talker("ann", "odd"), talker("bob", "bad"), talker("cas", "good")]
    answer = await collect(ranking(BY_JUDGE, [*members, judge]), REQUEST)
    assert answer.text == "good"
    assert answer.done.trace["num_failed_judgements"] == 4
    assert answer.done.trace["preferences"][0] == [0.5, 0.5, 0.5]


async def test_a_judge_that_always_fails_fails_the_answer(talker: Callable) -> None:
    judge = Judge({}, fails_on=("a", "b"))
    with pytest.raises(TurnoutError, match="cannot read that"):
        await collect(ranking(BY_JUDGE, [talker("ann", "a"), talker("bob", "b"), judge]), REQUEST)


async def test_at_the_deadline_what_is_not_judged_is_a_draw(talker: Callable) -> None:
    judge = Judge({"a": 0.0, "b": 1.0}, delay_s=30)
    hurried = replace(REQUEST, deadline_s=0.2)
    answer = await collect(ranking(BY_JUDGE, [talker("ann", "a"), talker("bob", "b"), judge]), hurried)
    assert answer.text == "a"
    assert answer.done.trace["num_failed_judgements"] == 2


async def test_raw_prompts_are_judged_raw(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 1.0})
    best = ranking(BY_JUDGE, [talker("ann", "bad"), talker("bob", "good"), judge])
    assert (await collect(best, GenerationRequest(prompt="Once"))).text == "good"


async def test_without_a_comparer_the_likeliest_answer_per_token_wins() -> None:
    members = [Scored("ann", "long and likely", (-1.0, -1.0, -1.0, -1.0)), Scored("bob", "short", (-2.0,))]
    answer = await collect(ranking({}, members), REQUEST)
    assert answer.text == "long and likely"
    assert answer.done.trace["scores"] == [-1.0, -2.0]
    assert answer.done.trace["margin"] == 1.0


@dataclass
class Mixed(Scored):
    """A probability average on an engine that cannot show its members' views of a token."""

    host: object = None
    mixture: Mixture = field(default_factory=lambda: Mixture({"ann": 1.0, "bob": 1.0}))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        if request.explain:
            raise UnsupportedError("it does not show its members' views", param="ensemble.explain")
        async for event in super().generate(request):
            yield event


async def test_views_of_tokens_that_no_trace_shows_are_not_asked_for() -> None:
    answer = await collect(ranking({}, [Mixed("mix", "sure", (-1.0,)), Scored("bob", "unsure", (-2.0,))]), REQUEST)
    assert answer.text == "sure"
    assert answer.done.trace["scores"] == [-1.0, -2.0]


async def test_members_without_log_probabilities_are_silent(talker: Callable) -> None:
    members = [Scored("ann", "words", ()), Scored("bob", "short", (-2.0,))]
    answer = await collect(ranking({}, members), REQUEST)
    assert answer.text == "short"
    assert answer.done.trace["silent"] == [
        {"member": "ann", "sample": 0, "reason": "member 'ann': the answer came without log-probabilities"}
    ]
    with pytest.raises(TurnoutError, match="without log-probabilities"):
        await collect(ranking({}, members[:1]), REQUEST)


async def test_a_cross_encoder_scores_prompt_and_answer(talker: Callable) -> None:
    asked: list[tuple[str, list[str]]] = []

    class LongestFirst:
        def __init__(self, path: str) -> None:
            assert path == "some/encoder"

        async def score(self, prompt: str, texts: list[str]) -> np.ndarray:
            asked.append((prompt, list(texts)))
            return np.array([float(len(text)) for text in texts])

    best = ranking(
        {"cross_encoder": "some/encoder"},
        [talker("ann", "short"), talker("bob", "the longest")],
        Services(reranker=LongestFirst),
    )
    answer = await collect(best, REQUEST)
    assert answer.text == "the longest"
    assert answer.done.trace["scores"] == [5.0, 11.0]
    assert asked == [("Where is the cat?", ["short", "the longest"])]
    assert (await collect(best, GenerationRequest(prompt="Once"))).text == "the longest"
    assert asked[1][0] == "Once"


async def test_a_real_cross_encoder_is_read_from_its_folder(talker: Callable, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "mat", "dog"]
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)

    reranker = CrossEncoderReranker("encoder", relative_to=tmp_path)
    scores = await reranker.score("cat", ["mat", "dog dog"])
    assert scores == pytest.approx(CrossEncoder(str(folder)).predict([("cat", "mat"), ("cat", "dog dog")]), abs=1e-5)
    with pytest.raises(ModelLoadError, match=r"cross-encoder .*missing.* cannot be loaded"):
        await CrossEncoderReranker("missing/encoder", relative_to=tmp_path).score("cat", ["mat"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"judge": "judge", "cross_encoder": "x"}, "not both"),
        ({"members": {"ann": 2}}, "takes no weights but 0 and 1"),
        ({"judge": "judge", "criterion": ""}, "at least 1 character"),
    ],
)
def test_wrong_configs_are_refused(config: Mapping, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method_class("ranking").Config.model_validate({"method": "ranking", "members": ["ann"]} | config)


def test_the_judge_is_one_of_the_models_that_are_needed() -> None:
    config = method_class("ranking").Config(method="ranking", members=["ann"], judge="judge")
    assert config.references() == {"ann", "judge"}


def test_what_cannot_compare_is_refused_at_load(talker: Callable, compose: Callable) -> None:
    with pytest.raises(ModelLoadError, match="the judge 'judge' gives text"):
        ranking(BY_JUDGE, [talker("ann", "x"), talker("judge", "A")])
    with pytest.raises(ModelLoadError, match="cross-encoders cannot be loaded"):
        ranking({"cross_encoder": "x"}, [talker("ann", "x")])
    crowd = compose({"method": "crowd_vote"}, [talker("ann", "x")])
    with pytest.raises(ModelLoadError, match="'crowd' gives no log-probabilities"):
        ranking({}, [crowd])


async def test_requests_may_leave_members_out_and_change_the_criterion(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 1.0})
    best = ranking(BY_JUDGE, [talker("ann", "bad"), talker("bob", "good"), judge])
    changed = replace(REQUEST, overrides={"weights": {"ann": 1, "bob": 0}, "criterion": "longer"})
    assert (await collect(best, changed)).text == "bad"
    with pytest.raises(RequestError, match=r"unknown key 'ensemble\.judge'"):
        await collect(best, replace(REQUEST, overrides={"judge": "ann"}))
    with pytest.raises(UnsupportedError, match="ranking"):
        await collect(best, replace(REQUEST, top_logprobs=1))


async def test_several_choices_are_rankings_of_their_own(talker: Callable) -> None:
    judge = Judge({"bad": 0.0, "good": 1.0, "fair": 0.5})
    best = ranking(BY_JUDGE, [talker("ann", "bad", "fair"), talker("bob", "good", "bad"), judge])
    answer = await collect(best, replace(REQUEST, n=2))
    assert [choice.text for choice in answer.choices] == ["good", "fair"]


async def test_judges_do_not_read_thoughts(talker: Callable) -> None:
    judge = Judge({"good": 1.0, "bad": 0.0})
    best = ranking(BY_JUDGE, [talker("ann", "<think>good</think>bad"), talker("bob", "<think>bad</think>good"), judge])
    assert (await collect(best, REQUEST)).text == "<think>bad</think>good"
