from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.rehearsal import rehearse
from ensemble_server.server.weights.quantisation import check_quantisation, quantisation_of


@pytest.fixture
def quantised(tiny: dict[str, Path], tmp_path: Path):
    """A copy of the tiny llama whose config says that it is quantised."""

    def make(name: str = "small", **settings: Any) -> Path:
        folder = shutil.copytree(tiny["llama"], tmp_path / name)
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return folder

    return make


def test_plain_weights_are_no_concern(tiny: dict[str, Path]) -> None:
    assert quantisation_of(tiny["llama"]) is None
    check_quantisation(tiny["llama"], "cpu")


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "no-such-method"])
def test_a_method_whose_package_is_not_here_is_refused_by_name(quantised, method: str) -> None:
    folder = quantised(quant_method=method, bits=4, group_size=128)
    with pytest.raises(
        ModelLoadError, match=rf"is quantised \({method}\), which cannot be loaded on cpu here: "
    ) as caught:
        check_quantisation(folder, "cpu")
    assert str(folder) in str(caught.value)


def test_it_is_found_before_weights_are_loaded_and_adapters_are_kept_off(quantised, tiny: dict[str, Path]) -> None:
    folder = quantised(quant_method="gptq", bits=4, group_size=128)
    models = {"small": {"path": str(folder)}, "expert": {"base": "small", "adapter": str(tiny["red"])}}
    problems = rehearse(parse_config({"models": models}, source=Path("/c.yaml"))).problems
    assert len(problems) == 2
    assert problems[0].startswith("model 'small': ") and "(gptq)" in problems[0]
    assert "adapter 'expert' stands on quantised weights" in problems[1]
