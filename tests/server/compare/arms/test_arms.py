from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.compare.arms.candidates import ArmModel
from ensemble_server.server.compare.arms.footprint import clusters, footprint, groups, leaves
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.excerpt import closure, excerpt
from ensemble_server.server.config.loading import parse_config


def arm(name: str) -> ArmModel:
    return ArmModel(name, None, name, "member", (name,))


@pytest.fixture(scope="module")
def config(tiny: dict[str, Path]) -> Config:
    models = {
        "base": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "green": {"base": "base", "adapter": str(tiny["green"])},
        "deep": {"path": str(tiny["deep"]), "dtype": "float32"},
        "mix": {"method": "probability_average", "members": ["base", "red"]},
        "vote": {"method": "crowd_vote", "members": ["mix", "green"], "similarity": {"rouge_l_word": 1}},
        "gone": {"base": "base", "adapter": str(tiny["llama"] / "nowhere")},
    }
    return parse_config({"models": models, "engine": {"max_context": 64}}, source=tiny["llama"] / "c.yaml")


def test_only_what_the_arms_need_is_loaded(config: Config) -> None:
    assert closure(config, ["vote"]) == ["base", "red", "green", "mix", "vote"]
    assert list(excerpt(config, ["red"]).models) == ["base", "red"]


def test_the_base_of_an_adapter_is_loaded_but_does_not_run(config: Config) -> None:
    assert leaves(config, "red") == {"red"}
    assert leaves(config, "vote") == {"base", "red", "green"}
    alone, adapter = footprint(config, "base"), footprint(config, "red")
    assert adapter.kv_bytes_per_token == alone.kv_bytes_per_token
    assert adapter.weights_bytes > alone.weights_bytes
    assert footprint(config, "mix").kv_bytes_per_token == 2 * alone.kv_bytes_per_token
    assert footprint(config, "mix").weights_bytes == adapter.weights_bytes, "shared weights are counted once"


def test_arms_that_share_weights_stand_together_in_the_plans_order(config: Config) -> None:
    arms = [arm(name) for name in ("green", "deep", "mix", "red", "vote")]  # all but one stand on `base`
    names = [[one.arm for one in cluster] for cluster in clusters(config, arms)]
    assert names == [["green", "mix", "red", "vote"], ["deep"]]


def test_arms_are_loaded_in_groups_that_fit_into_memory(config: Config) -> None:
    arms = [arm(name) for name in ("base", "red", "deep", "mix")]
    assert [[one.arm for one in group] for group in groups(config, arms, free_bytes=1e12)] == [
        ["base", "red", "deep", "mix"]
    ]
    one_model = footprint(config, "red").weights_bytes + 64 * footprint(config, "mix").kv_bytes_per_token
    tight = groups(config, arms, free_bytes=one_model / 0.8)
    assert [[one.arm for one in group] for group in tight] == [["base", "red"], ["deep"], ["mix"]]
    assert len(groups(config, arms, free_bytes=0)) == len(arms), "what does not fit is tried alone"


def test_the_identity_follows_content_and_settings_and_not_names(config: Config, tiny: dict[str, Path]) -> None:
    models = {
        "other_name": {"path": str(tiny["llama"]), "dtype": "float32"},
        "prompted": {"base": "other_name", "system_prompt": "Be brief."},
        "red": {"base": "other_name", "adapter": str(tiny["red"])},
        "half": {"path": str(tiny["llama"]), "dtype": "bfloat16"},
    }
    renamed = parse_config({"models": models}, source=tiny["llama"] / "c.yaml")
    assert identity(renamed, "other_name") == identity(config, "base")
    assert identity(renamed, "red") == identity(config, "red")
    different = [
        identity(renamed, "prompted"),
        identity(renamed, "half"),
        identity(config, "red"),
        identity(config, "mix"),
    ]
    assert len({identity(config, "base"), *different}) == 5


def test_an_adapter_that_is_not_there_is_an_error_that_names_it(config: Config) -> None:
    with pytest.raises(ModelLoadError, match=r"'gone'.*nowhere holds no adapter_config.json"):
        identity(config, "gone")
