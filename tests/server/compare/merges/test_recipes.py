from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.merges.recipes import read_recipe

RECIPES = sorted((Path(__file__).parents[4] / "configs" / "merges").glob("*.yml"))


def written(recipe: dict[str, Any]) -> list[str]:
    return [reference.written for reference in read_recipe(recipe, folder=Path("/")).references]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_that_ship_are_read(file: Path) -> None:
    recipe = read_recipe(file, folder=Path("/nowhere"))
    assert recipe.folder == file.parent
    assert recipe.method == file.stem.replace("-", "_")
    assert {reference.written for reference in recipe.references} <= {"base", "code", "jargon", "shakespeare"}


def test_depth_up_scaling_repeats_the_middle_half_of_thirty_layers() -> None:
    recipe = yaml.safe_load(next(file for file in RECIPES if file.stem == "passthrough").read_text())
    ranges = [source["layer_range"] for part in recipe["slices"] for source in part["sources"]]
    assert ranges == [[0, 30 - 7], [7, 30]]


def test_the_base_model_comes_first_wherever_it_stands() -> None:
    recipe = {"merge_method": "ties", "models": [{"model": "x"}, {"model": "y"}], "base_model": "y"}
    assert written(recipe) == ["y", "x"]


def test_models_are_found_wherever_mergekit_takes_one() -> None:
    recipe = {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "base_model": "b"}],
        "tokenizer": {
            "source": "c",
            "tokens": {
                "<model>": {"source": "d"},
                "<x>": {"source": {"kind": "model_token", "model": "e", "token_id": 1}},
                "<y>": {"source": {"kind": "zero"}},
            },
        },
    }
    read = read_recipe(recipe, folder=Path("/"))
    assert [reference.written for reference in read.references] == ["a", "b", "c", "d", "e"]
    replaced = read.with_models(lambda reference: reference.written.upper())
    assert replaced["slices"][0] == {"sources": [{"model": "A", "layer_range": [0, 1]}], "base_model": "B"}
    assert replaced["tokenizer"]["tokens"]["<x>"]["source"]["model"] == "E"
    assert recipe["tokenizer"]["source"] == "c"


def test_union_and_base_are_no_models_where_a_tokenizer_is_asked_for() -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "tokenizer_source": "union"}
    assert written(recipe) == ["a"]


def test_a_reference_may_be_a_map() -> None:
    model = {"model": {"path": "a", "revision": None}, "lora": {"path": "b"}, "override_architecture": "X"}
    read = read_recipe({"merge_method": "linear", "models": [{"model": model}]}, folder=Path("/"))
    (reference,) = read.references
    assert (reference.path, reference.lora, reference.architecture) == ("a", "b", "X")
    replaced = read.with_models(lambda _: "weights")
    assert replaced["models"][0]["model"] == {"model": {"path": "weights"}, "override_architecture": "X"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merge_metod": "linear"}, "unknown key 'merge_metod'; did you mean 'merge_method'?"),
        ({"merge_method": "tie"}, "there is no method 'tie'; did you mean 'ties'?"),
        (
            {"models": [{"model": "a", "parameter": {}}]},
            r"unknown key 'models\.0\.parameter'; did you mean 'parameters'",
        ),
        ({"models": [{"model": "a", "parameters": {"densty": 1}}]}, r"'models\[0\]\.parameters\.densty'; did you mean"),
        ({"slices": []}, "Exactly one of 'models', 'slices', or 'modules'"),
        ({"models": [{"parameters": {}}]}, r"models\.0\.model: Field required"),
        ({"models": None}, "Exactly one of"),
        ({"merge_method": None}, "needs `merge_method`"),
    ],
)
def test_what_mergekit_would_read_over_or_trip_on_is_named(changes: dict[str, Any], said: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}]} | changes
    if changes == {"slices": []}:
        recipe["slices"] = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
    with pytest.raises(ConfigError, match=said):
        read_recipe(recipe, folder=Path("/"))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"density": 0.2}}]},
            ["models[0].parameters.density: linear has no such parameter", "it takes weight, normalize"],
        ),
        (
            {
                "merge_method": "arcee_fusion",
                "base_model": "a",
                "models": [{"model": "b", "parameters": {"weight": 1}}, {"model": "c"}],
                "dtpe": "float32",
            },
            [
                "unknown key 'dtpe'",
                "arcee_fusion has no such parameter",
                "it takes none",
                "takes 1 beside the base, got 2",
            ],
        ),
    ],
)
def test_a_setting_that_the_method_lacks_is_refused_with_all_else_that_is_wrong(recipe, said) -> None:
    """mergekit reads over it: who set a density in vain would compare another merge than they think."""
    with pytest.raises(ConfigError) as caught:
        read_recipe(recipe, folder=Path("/"))
    assert all(part in str(caught.value) for part in said)


def test_a_parameter_that_changes_nothing_may_stand_anywhere() -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"int8_mask": True}, "name": "mine"}
    assert written(recipe) == ["a"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text("merge_method: liner\nmodells: []\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_recipe(file, folder=Path("/"))
    assert str(file) in str(caught.value)
    assert "modells" in str(caught.value)
    assert "'liner'" in str(caught.value)


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text("- a\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="must be a map of mergekit's keys"):
        read_recipe(file, folder=Path("/"))
