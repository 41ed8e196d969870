"""Which members share a vLLM model, and what that model's own mixture is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.vllm_engine.placement import Placement, Weights, placements

A, B, C = ({"path": f"/{name}"} for name in "abc")


def placed(**models: dict[str, Any]) -> list[Placement]:
    config = parse_config({"models": models}, source=Path("/config.yaml"))
    hosted = {name: entry for name, entry in config.models.items() if isinstance(entry, HostedModel)}
    checkpoints = {name: Path(entry.path) for name, entry in hosted.items() if entry.path is not None}
    return placements(config.models, checkpoints)


def average(*members: str, **changes: Any) -> dict[str, Any]:
    return {"method": "probability_average", "members": list(members), **changes}


def names(found: list[Placement]) -> list[list[str]]:
    return [list(placement.slots) for placement in found]


def test_models_that_nothing_joins_are_apart() -> None:
    vote = {"method": "crowd_vote", "members": ["a", "b"], "similarity": {"rouge_l_word": 1}}
    assert names(placed(a=A, b=B, vote=vote)) == [["a"], ["b"]]


def test_members_of_an_average_are_together_and_loaded_once() -> None:
    found = placed(a=A, b=B, c=C, mix=average("a", "c"))
    assert names(found) == [["a", "c"], ["b"]]
    assert list(found[0].parts.values()) == [Weights(Path("/a"), "auto"), Weights(Path("/c"), "auto")]


def test_averages_that_share_a_member_are_one_model() -> None:
    [found] = placed(a=A, b=B, c=C, left=average("a", "b"), right=average("b", "c"))
    assert found.slots == {"a": 0, "b": 1, "c": 2}


def test_a_base_and_its_adapters_are_together() -> None:
    red = {"base": "a", "adapter": "/red"}
    [found, other] = placed(b=B, red=red, a=A)[::-1]
    assert found.slots == {"red": 0, "a": 1} and list(other.slots) == ["b"]
    assert found.parts["red"] == Weights(Path("/a"), "auto", Path("/red"))


def test_a_base_that_only_lends_its_weights_is_not_run() -> None:
    hidden = A | {"listed": False}
    red = {"base": "a", "adapter": "/red"}
    [found] = placed(a=hidden, red=red)
    assert found.slots == {"red": 0} and found.parts == {"red": Weights(Path("/a"), "auto", Path("/red"))}
    [found] = placed(a=hidden, red=red, blue=red | {"adapter": "/blue"}, mix=average("red", "blue"))
    assert found.slots == {"red": 0, "blue": 1} and found.mixture == Mixture({"red": 1.0, "blue": 1.0})


@pytest.mark.parametrize(
    "more",
    [
        {"mix": average("a", "red")},
        {"vote": {"method": "crowd_vote", "members": ["a", "red"], "similarity": {"rouge_l_word": 1}}},
        {"polite": {"base": "a", "system_prompt": "Be polite."}},
    ],
)
def test_a_hidden_base_that_others_speak_through_is_run(more: dict[str, Any]) -> None:
    [found] = placed(a=A | {"listed": False}, red={"base": "a", "adapter": "/red"}, **more)
    assert found.slots["a"] != found.slots["red"] and len(found.parts) == 2


def test_views_of_the_same_weights_are_one_part_whose_weights_add_up() -> None:
    polite = {"base": "a", "system_prompt": "Be polite."}
    [found] = placed(a=A, polite=polite, b=B, mix=average("a", "b"))
    assert found.slots == {"a": 0, "polite": 0, "b": 1}
    assert list(found.parts) == ["a", "b"]
    asked = Mixture({"a": 1.0, "polite": 2.0, "b": 4.0}, "geometric")
    assert found.mixture_of_parts(asked) == Mixture({"a": 3.0, "b": 4.0}, "geometric")


def test_the_same_folder_in_two_dtypes_is_loaded_twice() -> None:
    assert names(placed(a=A | {"dtype": "float32"}, b=A | {"dtype": "bfloat16"}, c=A | {"dtype": "float32"})) == [
        ["a", "c"],
        ["b"],
    ]


def test_a_model_without_posterior_ensembles_keeps_no_evidence() -> None:
    [found] = placed(a=A, b=B, mix=average("a", "b", pool="geometric"))
    assert found.mixture == Mixture({"a": 1.0, "b": 1.0})


def test_with_plain_bayes_the_models_own_mixture_is_uniform() -> None:
    follows = {"method": "probability_average", "members": {"a": 3, "b": 1}, "pool": "posterior"}
    [found] = placed(a=A, b=B, adaptive=follows)
    assert found.mixture == Mixture({"a": 1.0, "b": 1.0}, "posterior")


def test_with_a_share_the_models_own_mixture_is_the_ensembles() -> None:
    follows = {"method": "probability_average", "members": {"a": 3, "b": 1}, "pool": "posterior", "share": 0.1}
    [found] = placed(a=A, b=B, c=C, all=average("a", "b", "c"), adaptive=follows)
    assert found.mixture == Mixture({"a": 3.0, "b": 1.0, "c": 0.0}, "posterior", 0.1)


def test_a_learnt_share_is_refused_by_name_with_the_way_out() -> None:
    learnt = {"method": "probability_average", "members": ["a", "b"], "pool": "posterior", "share": "auto"}
    with pytest.raises(ModelLoadError, match=r"model 'adaptive': share: auto is learnt by the transformers engine"):
        placed(a=A, b=B, adaptive=learnt)


def test_two_shares_on_one_model_are_refused_with_the_way_out() -> None:
    one, other = (average("a", "b", pool="posterior", share=share) for share in (0.1, 0.2))
    with pytest.raises(ModelLoadError, match=r"'one' and 'other' are on one vLLM model.*`share: 0`"):
        placed(a=A, b=B, one=one, other=other)
    assert len(placed(a=A, b=B, one=one, other=one)) == 1
