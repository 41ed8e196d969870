from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.server.config.loading import load_config
from tests.conftest import make_model
from tests.server.cli.conftest import Run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in the working folder."""
    make_model(tmp_path / "base")
    make_model(tmp_path / "tuned", seed=1, vocab_size=321, extra=("<pad>",))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_config_that_loads_and_says_what_comes_next(ensemble: Callable[..., Run], here: Path) -> None:
    run = ensemble("init", "base", "tuned")
    assert (run.code, run.err) == (0, "")
    config = load_config(here / "ensemble.yaml")
    assert list(config.models)[:3] == ["base", "tuned", "mix"]
    assert [line.split()[1] for line in run.out.splitlines() if line.startswith("  ensemble ")] == [
        "models",
        "chat",
        "serve",
    ]
    assert ensemble("models", "ensemble.yaml").code == 0


def test_a_file_that_is_there_is_not_written_over_unasked(ensemble: Callable[..., Run], here: Path) -> None:
    (here / "mine.yaml").write_text("precious")
    run = ensemble("init", "base", "-o", "mine.yaml")
    assert run.code == 2 and "is there already" in run.err
    assert (here / "mine.yaml").read_text() == "precious"
    assert ensemble("init", "base", "-o", "mine.yaml", "--force").code == 0


def test_a_config_elsewhere_still_finds_what_was_named_from_here(ensemble: Callable[..., Run], here: Path) -> None:
    (here / "configs").mkdir()
    assert ensemble("init", "base", "-o", "configs/e.yaml").code == 0
    assert load_config(here / "configs" / "e.yaml").models["base"].path == str(here / "base")


def test_without_arguments_it_takes_what_is_here_only_if_told_so(ensemble: Callable[..., Run], here: Path) -> None:
    asked = ensemble("init")
    assert asked.code == 2 and "./base" in asked.out and "--yes" in asked.err
    assert ensemble("init", "--yes").code == 0
    assert list(load_config(here / "ensemble.yaml").models)[:2] == ["base", "tuned"]


def test_what_is_no_model_is_one_error(ensemble: Callable[..., Run], here: Path) -> None:
    run = ensemble("init", "base", "gone")
    assert run.code == 1 and run.err.startswith("error: 'gone' is neither a folder")
    assert not (here / "ensemble.yaml").exists()


def test_chat_takes_models_in_place_of_a_config(ensemble: Callable[..., Run], here: Path) -> None:
    run = ensemble("chat", "base", "tuned", "--message", "Hi", "--max-tokens", "2", "--model", "mix")
    assert run.code == 0 and run.out.endswith("\n")
    assert "Loading base, tuned, mix" in run.err
