from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.server.compare.merges import merge_process, merging
from tests.conftest import make_adapter, make_model
from tests.server.cli.conftest import Run

Ensemble = Callable[..., Run]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe beside a config; merges run in this process, into an empty cache."""
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(merging, "_run_in_own_process", merge_process.run)
    base = make_model(tmp_path / "base")
    make_adapter(tmp_path / "code", base, seed=1)
    (tmp_path / "c.yaml").write_text(
        "models: {small: {path: base}, code: {base: small, adapter: code}}", encoding="utf-8"
    )
    file = tmp_path / "linear.yml"
    file.write_text("{merge_method: linear, models: [{model: small}, {model: code}], parameters: {weight: 1}}")
    return file


def test_a_merge_is_written_and_can_be_served(recipe: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    out = tmp_path / "made" / "merged"
    run = ensemble("merge", recipe, "--config", tmp_path / "c.yaml", "--out", out)
    assert run.code == 0, run.err
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert f"merged: {{path: {out}}}" in run.out
    assert run.err.splitlines() == [
        "folding the adapter of code",
        "merging 2 models by linear",
        "checking the merged model",
        "copying",
    ]
    (tmp_path / "merged.yaml").write_text(f"models: {{merged: {{path: {out}}}}}", encoding="utf-8")
    assert ensemble("models", tmp_path / "merged.yaml").code == 0


def test_the_second_time_it_is_copied_from_the_cache(recipe: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    for name in ("first", "second"):
        run = ensemble("merge", recipe, "--config", tmp_path / "c.yaml", "--out", tmp_path / name)
    assert run.err.splitlines() == ["copying"]
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()


def test_a_folder_with_something_in_it_is_left_alone(recipe: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    run = ensemble("merge", recipe, "--out", tmp_path)
    assert run.code == 2
    assert "is there already and not empty" in run.err


def test_a_wrong_recipe_is_one_error_and_leaves_no_folder(recipe: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    recipe.write_text("{merge_method: linaer, models: [{model: small}]}", encoding="utf-8")
    run = ensemble("merge", recipe, "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    assert run.code == 1
    assert run.err.startswith(f"error: {recipe}: merge_method: there is no method 'linaer'; did you mean 'linear'?")
    assert not (tmp_path / "out").exists()


def test_names_of_the_config_need_the_config(recipe: Path, tmp_path: Path, ensemble: Ensemble) -> None:
    run = ensemble("merge", recipe, "--out", tmp_path / "out")
    assert run.code == 1
    assert "model 'small'" in run.err
