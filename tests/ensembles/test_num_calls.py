"""How many calls of models a reply may take: what methods say, what they do, and where it is bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import GenerationRequest, collect
from ensemble_server.ensembles.errors import ConfigError, RequestError
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.registry import method_class
from ensemble_server.server.config.loading import load_config

ASK = GenerationRequest(prompt="Why?")

# Each with the calls that a reply takes if nothing stops it early.
METHODS = [
    ({"method": "crowd_vote", "members": ["ann", "bob"], "samples": 3}, 6),
    ({"method": "crowd_vote", "members": {"ann": 1, "bob": 0}, "samples": 3}, 3),
    ({"method": "majority", "members": ["ann", "bob"], "samples": 3, "early_stop": False}, 6),
    ({"method": "exchange_of_thought", "members": ["ann", "bob"], "max_rounds": 4, "stop": "never"}, 10),
    (
        {
            "method": "exchange_of_thought",
            "participants": {name: {"model": "ann"} for name in "xyz"},
            "max_rounds": 1,
            "stop": "never",
        },
        6,
    ),
    ({"method": "answer_fusion", "members": ["ann", "bob"], "aggregator": "eve", "layers": 2, "samples": 2}, 9),
    ({"method": "answer_fusion", "members": ["ann", "bob"], "aggregator": "ann"}, 3),
    ({"method": "self_correction", "members": ["ann"], "max_rounds": 2}, 5),
]


def made(config: dict[str, Any], models: dict[str, Any], max_calls: int | None = None, name: str = "all") -> Any:
    cls = method_class(config["method"])
    parsed = cls.Config.model_validate(config)
    return cls(name, parsed, {part: models[part] for part in parsed.references()}, Services(max_calls=max_calls))


@pytest.fixture
def models(talker: Callable) -> dict[str, Any]:
    return {name: talker(name, f"{name} speaks, the answer is wrong") for name in ("ann", "bob", "eve")}


@pytest.mark.parametrize(("config", "num_calls"), METHODS)
async def test_a_method_says_how_many_calls_a_reply_takes(
    models: dict[str, Any], config: dict[str, Any], num_calls: int
) -> None:
    method = made(config, models, max_calls=num_calls)
    assert method.num_calls() == num_calls
    await collect(method, ASK)
    assert sum(len(model.requests) for model in models.values()) == num_calls


@pytest.mark.parametrize(("config", "num_calls"), METHODS)
async def test_one_call_more_than_allowed_is_refused_before_the_first(
    models: dict[str, Any], config: dict[str, Any], num_calls: int
) -> None:
    with pytest.raises(
        RequestError, match=f"could take {num_calls} calls of models, server.max_calls is {num_calls - 1}"
    ):
        await collect(made(config, models, max_calls=num_calls - 1), ASK)
    assert not any(model.requests for model in models.values())


async def test_choices_and_overrides_count(models: dict[str, Any]) -> None:
    crowd = made({"method": "crowd_vote", "members": ["ann", "bob"]}, models, max_calls=6)
    await collect(crowd, GenerationRequest(prompt="Why?", n=3))
    with pytest.raises(RequestError, match="could take 8 calls") as raised:
        await collect(crowd, GenerationRequest(prompt="Why?", n=4))
    assert raised.value.param == "n"
    with pytest.raises(RequestError, match="could take 8 calls") as raised:
        await collect(crowd, GenerationRequest(prompt="Why?", overrides={"samples": 4}))
    assert raised.value.param == "ensemble"


async def test_nested_ensembles_multiply(models: dict[str, Any]) -> None:
    inner = made({"method": "majority", "members": ["ann", "bob"], "samples": 3}, models, name="inner")
    outer = made({"method": "crowd_vote", "members": ["inner", "eve"], "samples": 2}, {**models, "inner": inner})
    assert outer.num_calls() == 2 * (6 + 1)


def test_the_judgements_of_a_ranking_count() -> None:
    config = method_class("ranking").Config(method="ranking", members=["a", "b"], samples=2, judge="c")
    assert config.num_calls({"a": 1, "b": 1, "c": 2}) == 4 + 4 * 3 * 2


def test_a_config_whose_replies_take_too_many_calls_is_refused_at_load(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "models:\n"
        "  a: {url: 'http://127.0.0.1:1/v1'}\n"
        "  b: {url: 'http://127.0.0.1:1/v1'}\n"
        "  crowd: {method: crowd_vote, members: [a, b], samples: 5}\n"
        "  talk: {method: exchange_of_thought, members: [crowd, a], max_rounds: 2}\n"
        "server: {max_calls: 32}\n",
        encoding="utf-8",
    )
    with pytest.raises(
        ConfigError, match=r"models\.talk: one reply may take 33 calls of models, server.max_calls is 32"
    ):
        load_config(file)
