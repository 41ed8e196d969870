"""What comes before the idea of every method of texts, and what none of them reads: thoughts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from ensemble_server.ensembles.base import Done, Event, GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.fan_out import Call, fan_out, total_usage
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.text_level import EmbeddingNeed, TextLevel, TextLevelConfig, as_delta, member_request

CHAT = GenerationRequest(messages=({"role": "user", "content": "How much?"},))


class Loudest(TextLevel):
    """The longest answer, in capitals."""

    reference = "https://example.org"
    overridable = ("weights",)

    class Config(TextLevelConfig):
        compares: bool = False

        def embedding_need(self) -> EmbeddingNeed | None:
            return EmbeddingNeed("compares", "comparing", "let it be") if self.compares else None

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        calls = [Call(name, self.models[name], member_request(request, name)) for name in config.members]
        outcomes = await fan_out(calls, ensemble=self.name)
        loudest = max((outcome.answer.choices[0] for outcome in outcomes if outcome.answer), key=lambda c: len(c.text))
        yield as_delta(loudest)
        yield Done(total_usage(outcome.usage for outcome in outcomes), "loudest", self.members, turnout=len(outcomes))


def loudest(models: list, services: Services | None = None, **config: Any) -> Loudest:
    parsed = Loudest.Config.model_validate({"method": "loudest", "members": [m.name for m in models], **config})
    return Loudest("all", parsed, {model.name: model for model in models}, services or Services())


async def test_a_method_begins_at_its_idea(talker: Callable) -> None:
    answer = await collect(loudest([talker("ann", "a"), talker("bob", "bbb")]), CHAT)
    assert (answer.text, answer.done.usage.completion_tokens) == ("bbb", 2)


async def test_what_comes_before_the_idea_is_done_for_it(talker: Callable) -> None:
    models = [talker("ann", "aaaa"), talker("bob", "bbb")]
    with pytest.raises(UnsupportedError, match="cannot honour logprobs"):
        await collect(loudest(models), GenerationRequest(prompt="a", top_logprobs=1))
    with pytest.raises(RequestError, match=r"unknown key 'ensemble\.samples'"):
        await collect(loudest(models), GenerationRequest(prompt="a", overrides={"samples": 2}))
    with pytest.raises(RequestError, match=r"max_calls is 3"):
        await collect(loudest(models, Services(max_calls=3)), GenerationRequest(prompt="a", n=2))
    only_bob = GenerationRequest(prompt="a", overrides={"weights": {"bob": 1}}, n=2, sampling=Sampling(seed=1))
    answer = await collect(loudest(models), only_bob)
    assert [choice.text for choice in answer.choices] == ["bbb", "bbb"]


def test_a_config_that_needs_an_embedding_model_is_refused_without_one(talker: Callable) -> None:
    with pytest.raises(ModelLoadError, match="'all': comparing needs an embedding model; set one up, or let it be"):
        loudest([talker("ann", "a")], compares=True)


THINKING = ("<think>the answer is 99, 99</think>It is 18.", "so 99\n</think>\n\nIt is 18.", "It is 17.")


async def test_thoughts_are_not_counted_and_stay_in_the_reply(talker: Callable, compose: Callable) -> None:
    members = [talker(name, text) for name, text in zip("abc", THINKING, strict=True)]
    major = compose({"method": "majority", "samples": 1, "answer": "number", "early_stop": False}, members)
    answer = await collect(major, GenerationRequest(prompt="?", explain=True))
    assert answer.text == THINKING[0]
    assert answer.done.trace["votes"] == {"18": 2.0, "17": 1.0}


async def test_thoughts_are_not_compared(talker: Callable, compose: Callable) -> None:
    texts = ["<think>x y z</think>a b", "<think>p q r</think>a b", "x y z"]
    crowd = compose({"method": "crowd_vote"}, [talker(name, text) for name, text in zip("abc", texts, strict=True)])
    answer = await collect(crowd, GenerationRequest(prompt="?", explain=True))
    assert answer.done.trace["scores"] == [1.0, 1.0, 0.0]
    assert answer.done.trace["equal_texts"] == [[0, 1], [2]]


async def test_aggregators_do_not_read_thoughts(talker: Callable, compose: Callable) -> None:
    writer = talker("eve", "18")
    members = [talker("ann", THINKING[0]), talker("bob", "<think>cut off"), writer]
    fused = compose({"method": "answer_fusion", "members": ["ann", "bob"], "aggregator": "eve"}, members)
    await collect(fused, CHAT)
    read = writer.requests[-1].messages[-1]["content"]
    assert read.endswith("1. It is 18.")
    assert "99" not in read and "cut off" not in read


async def test_peers_do_not_hear_thoughts(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", THINKING[0], "It is 18.")
    bob = talker("bob", "<think>cut off", "It is 18.")
    talk = compose({"method": "exchange_of_thought", "answer": "number", "max_rounds": 1}, [ann, bob])
    answer = await collect(talk, GenerationRequest(messages=CHAT.messages, explain=True))
    own, read = (message["content"] for message in ann.requests[1].messages[-2:])
    assert own == "It is 18."
    assert read.startswith("Nobody else has come to a solution yet.")
    own, read = (message["content"] for message in bob.requests[1].messages[-2:])
    assert own == "I did not come to a solution."
    assert "It is 18." in read and "99" not in read
    assert answer.done.trace["rounds"][0]["replies"]["ann"]["text"] == THINKING[0]
    assert answer.done.trace["rounds"][0]["replies"]["bob"]["answer"] is None
