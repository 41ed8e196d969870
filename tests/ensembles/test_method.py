from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.method import MethodConfig


def members(members: Any) -> dict[str, float]:
    return MethodConfig.model_validate({"method": "any", "members": members}).members


def test_a_list_of_members_gives_each_weight_one() -> None:
    assert members(["base", "code"]) == members({"base": 1, "code": 1}) == {"base": 1.0, "code": 1.0}


def test_members_keep_their_order() -> None:
    assert list(members({"z": 1, "a": 2, "m": 0})) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (["base", "base"], "listed twice; give it a weight"),
        ([], "at least 1"),
        ({}, "at least 1"),
        ("base", "a map from names to weights, got 'base'"),
        (["base", 3], "a map from names to weights"),
        ({"base": "much"}, "number"),
        ({"base": float("nan")}, "finite"),
        ({"base": float("inf")}, "finite"),
    ],
)
def test_what_is_no_list_and_no_map_of_weights_is_refused(wrong: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        members(wrong)


def test_a_method_refers_to_its_members() -> None:
    assert MethodConfig(method="any", members={"a": 1, "b": 0}).references() == {"a", "b"}


def test_a_config_is_frozen_and_knows_no_other_keys() -> None:
    config = MethodConfig(method="any", members={"a": 1})
    with pytest.raises(ValidationError, match="frozen"):
        config.listed = False
    with pytest.raises(ValidationError, match="weights"):
        MethodConfig(method="any", members={"a": 1}, weights={})
