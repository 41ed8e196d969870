"""A base and two adapters of it, averaged; the base learns from texts of a few windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.loading import load_config
from tests.conftest import SAMPLE, make_model
from tests.server.engines.transformers_engine.vocabularies import byte_fallback

CONFIG = """\
models:
  llama: {{path: {llama}, dtype: float32}}
  red: {{base: llama, adapter: {red}}}
  green: {{base: llama, adapter: {green}}}
  deep: {{path: {deep}, dtype: float32}}
  mix: {{method: probability_average, members: {{llama: 1, red: 2, green: 1}}}}
  adaptive: {{method: probability_average, members: [llama, red, green], pool: posterior, share: 0.01}}
  product: {{method: probability_average, members: {{red: 1, green: 1}}, pool: geometric}}
  contrast: {{method: probability_average, members: {{red: 1.5, green: -0.5}}, pool: geometric}}
  alone: {{method: probability_average, members: [llama]}}
  vote: {{method: majority, members: [llama, red], answer: number}}
"""


class Quiet:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: list[tuple[float, float | None]] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def progress(self, done: int, total: int) -> None:
        return

    def losses(self, clm: float, kl: float | None) -> None:
        self.steps.append((clm, kl))


@pytest.fixture
def config_file(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(**tiny))
    (tmp_path / "text.txt").write_text(SAMPLE)
    return path


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file)


@pytest.fixture
def wanted(config_file: Path) -> Callable[..., Distillation]:
    """What is wanted, of small windows; more settings can be given."""

    def make(**settings: Any) -> Distillation:
        usual: dict[str, Any] = {
            "ensemble": "adaptive",
            "student": "llama",
            "text": [str(config_file.with_name("text.txt"))],
            "window": 32,
            "held_out": 0.2,
            "top_k": 16,
        }
        return Distillation.model_validate(usual | settings)

    return make


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of another vocabulary: SentencePiece with byte fallback."""
    folder = tmp_path_factory.mktemp("other") / "gemma"
    byte_fallback(make_model(folder, "gemma3_text", seed=5, vocab_size=440))
    return folder
