"""What vLLM is given to load: checkpoints as they are where that is right, exported ensembles where it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.vllm_engine.directories import ModelFolder, model_folder
from ensemble_server.server.engines.vllm_engine.placement import placements
from ensemble_server.server.weights.member_views import read_member_files
from tests.conftest import make_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm"


def folders_of(models: Mapping[str, Any]) -> list[ModelFolder]:
    config = parse_config({"models": models}, source=Path("/config.yaml"))
    hosted = {name: entry for name, entry in config.models.items() if isinstance(entry, HostedModel)}
    files = read_member_files(hosted, relative_to=Path("/"), max_context=256)
    placed = placements(config.models, files.checkpoints)
    return [model_folder(placement, files.views, config.source) for placement in placed]


def members_of(folder: ModelFolder) -> list[dict[str, Any]]:
    return json.loads((folder.path / "config.json").read_bytes())["members"]


def test_a_single_model_is_loaded_as_it_is(tmp_path: Path, cache: Path) -> None:
    tight = make_model(tmp_path / "tight", vocab_size=320)
    assert folders_of({"a": {"path": str(tight)}}) == [ModelFolder(tight, is_ensemble=False)]
    assert not cache.exists()


def test_a_single_model_with_padded_logits_is_an_ensemble_of_one(tiny: dict[str, Path]) -> None:
    [found] = folders_of({"a": {"path": str(tiny["llama"])}})
    assert found.is_ensemble
    assert json.loads((found.path / "config.json").read_bytes())["vocab_size"] == 320


def test_members_of_an_average_become_one_directory(tiny: dict[str, Path]) -> None:
    members = {"base": 1, "red": 2, "deep": 1}
    models = {
        "base": {"path": str(tiny["llama"]), "system_prompt": "Be brief."},  # views stay with the server
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "deep": {"path": str(tiny["deep"])},
        "adaptive": {"method": "probability_average", "members": members, "pool": "posterior", "share": 0.1},
    }
    [found] = folders_of(models)
    config = json.loads((found.path / "config.json").read_bytes())
    assert [(member["name"], member["weight"]) for member in config["members"]] == [
        ("base", 1),
        ("red", 2),
        ("deep", 1),
    ]
    assert [member["adapter"] for member in config["members"]] == [None, str(tiny["red"]), None]
    assert (config["pool"], config["share"]) == ("posterior", 0.1)


def test_an_adapter_needs_its_base_in_no_place_of_its_own(tiny: dict[str, Path]) -> None:
    models = {
        "base": {"path": str(tiny["llama"]), "listed": False},
        "red": {"base": "base", "adapter": str(tiny["red"])},
    }
    [found] = folders_of(models)
    [member] = members_of(found)
    assert (member["name"], member["adapter"]) == ("red", str(tiny["red"]))


def test_the_same_config_finds_the_same_directory_again(tiny: dict[str, Path], cache: Path) -> None:
    models = {"a": {"path": str(tiny["llama"])}}
    [first], [second] = folders_of(models), folders_of(models)
    assert first == second
    [other] = folders_of({"a": {"path": str(tiny["llama"]), "dtype": "bfloat16"}})
    assert other != first
    assert sorted(cache.iterdir()) == sorted([first.path, other.path])  # and nothing half made
