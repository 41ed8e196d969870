"""What vLLM's engine says of members of different vocabularies; needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError, UnsupportedError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.vllm_engine.engine import VllmEngine
from ensemble_server.server.weights.member_views import read_member_files
from tests.conftest import make_model
from tests.server.engines.transformers_engine.vocabularies import byte_fallback


@pytest.fixture
def engine(tiny: dict[str, Path], tmp_path: Path) -> VllmEngine:
    """It knows its members, and has not been started."""
    byte_fallback(make_model(tmp_path / "gemma", "gemma3_text", seed=5, vocab_size=440))
    models = {"llama": HostedModel(path=str(tiny["llama"])), "gemma": HostedModel(path=str(tmp_path / "gemma"))}
    engine = object.__new__(VllmEngine)
    engine.views = read_member_files(models, relative_to=Path(), max_context=256).views
    return engine


def test_they_are_refused_when_the_config_is_loaded(engine: VllmEngine) -> None:
    assert engine.averages_over(Mixture({"llama": 1.0})) == "tokens"
    with pytest.raises(ModelLoadError, match="'llama' and 'gemma' have different vocabularies"):
        engine.averages_over(Mixture({"llama": 1.0, "gemma": 1.0}))


async def test_texts_are_not_read_byte_by_byte(engine: VllmEngine) -> None:
    with pytest.raises(UnsupportedError, match="not possible with vLLM"):
        await engine.visit_bytes(["llama"], "The quick", lambda *_: None)
