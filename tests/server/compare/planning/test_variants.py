"""Settings written out as variants: what users write, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.merges.recipes import read_recipe
from ensemble_server.server.compare.planning.blocks import Arm
from ensemble_server.server.compare.planning.variants import written_out

RECIPES = sorted((Path(__file__).parents[4] / "configs" / "merges").glob("*.yml"))
TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "code", "parameters": {"weight": 1, "density": 0.2}},
        {"model": "prose", "parameters": {"weight": 1, "density": 0.2}},
    ],
}


def variants(merge, choose, folder: Path = Path("/nowhere")) -> dict[str | None, dict]:
    arm = Arm.model_validate({"name": "arm", "merge": merge, "choose": choose})
    return {variant.label: variant.merge for variant in written_out(arm, folder, {"base", "code", "prose"}).variants}


def test_every_combination_takes_the_place_of_what_the_recipe_says() -> None:
    made = variants(TIES, {"density": [0.3, 0.7], "lambda": [1, 2]})
    assert list(made) == [f"density {density}, lambda {scale}" for density in (0.3, 0.7) for scale in (1, 2)]
    found = made["density 0.7, lambda 2"]
    assert [entry["parameters"] for entry in found["models"]] == [{"weight": 1, "density": 0.7}] * 2
    assert found["parameters"] == {"lambda": 2}
    assert TIES["models"][0]["parameters"]["density"] == 0.2  # is not changed


def test_a_map_gives_each_model_its_own_value() -> None:
    made = variants(TIES, {"weight": [1, {"code": 0.7, "prose": 0.3}]})
    assert [entry["parameters"]["weight"] for entry in list(made.values())[1]["models"]] == [0.7, 0.3]
    assert list(made)[1] == "weight code 0.7 prose 0.3"


def test_what_the_recipe_does_not_set_goes_where_the_method_looks_for_it() -> None:
    recipe = {"merge_method": "sce", "base_model": "base", "models": [{"model": "base"}, {"model": "code"}]}
    assert [one["parameters"] for one in variants(recipe, {"select_topk": [0.1, 0.5]}).values()] == [
        {"select_topk": 0.1},
        {"select_topk": 0.5},
    ]
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "base"}, {"model": "code"}]}
    first = next(iter(variants(recipe, {"density": [0.1, 0.5]}).values()))
    assert [entry.get("parameters") for entry in first["models"]] == [None, {"density": 0.1}]  # the base has none


def test_auto_of_a_linear_merge_emphasises_each_model_in_turn() -> None:
    recipe = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}} for name in "abc"]}
    made = variants(recipe, "auto")
    weights = [[entry["parameters"]["weight"] for entry in one["models"]] for one in made.values()]
    assert weights == [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]]
    assert next(iter(made)) == "as written"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_that_ships_and_has_a_setting_can_be_chosen(file: Path) -> None:
    if file.stem in ("karcher", "arcee-fusion", "passthrough", "moe"):
        with pytest.raises(ConfigError, match="has no setting to choose"):
            variants(str(file), "auto")
        return
    made = variants(str(file), "auto")
    assert 2 <= len(made) <= 6
    assert yaml.safe_load(file.read_text()) in made.values()  # as written is always tried
    for merge in made.values():
        read_recipe(merge, folder=file.parent)


def test_folders_beside_a_recipe_are_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "code").mkdir()  # a name of the config wins
    recipe = {"merge_method": "slerp", "base_model": "weights", "models": [{"model": "weights"}, {"model": "code"}]}
    (tmp_path / "slerp.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for merge in variants(str(tmp_path / "slerp.yml"), "auto").values():
        assert merge["base_model"] == merge["models"][0]["model"] == str(tmp_path / "weights")
        assert merge["models"][1]["model"] == "code"


def test_keys_of_an_ensemble_can_be_chosen_too() -> None:
    entry = {"method": "probability_average", "members": ["base", "code"], "pool": "posterior"}
    arm = Arm.model_validate({"name": "p", "ensemble": entry, "choose": {"share": [0.01, 0.1]}})
    assert [variant.ensemble for variant in written_out(arm, Path("/"), set()).variants] == [
        {**entry, "share": 0.01},
        {**entry, "share": 0.1},
    ]


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"merge": TIES, "choose": {"densty": [0.1, 0.2]}}, "ties has no parameter 'densty'; did you mean 'density'?"),
        ({"merge": TIES, "choose": {"density": [0.1]}}, "leaves one variant"),
        ({"merge": TIES, "choose": {"density": [n / 100 for n in range(40)]}}, "40 variants; at most 32 are tried"),
        ({"merge": TIES, "choose": {"weight": [{"code": 1}, 1]}}, "gives no value for 'prose'"),
        ({"ensemble": {"method": "majority"}, "choose": "auto"}, "belongs to a `merge`"),
    ],
)
def test_settings_that_cannot_be_chosen_are_refused(arm, told) -> None:
    with pytest.raises(ConfigError) as caught:
        written_out(Arm.model_validate({"name": "arm", **arm}), Path("/"), set())
    assert told in str(caught.value)
