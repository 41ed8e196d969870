"""GGUF files that are written for llama.cpp, read by transformers: it knows the format and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gguf_writing import Precision, write_gguf

IDS = torch.tensor([[5, 90, 17, 200, 33, 4, 250, 71]])


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 2e-2), ("q8_0", 0.3)])
@pytest.mark.filterwarnings("ignore")  # transformers' about its GGUF loading
def test_what_is_written_computes_what_the_checkpoint_does(
    tiny: dict[str, Path], tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    write_gguf(tiny["llama"], tmp_path / "model.gguf", precision)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32)
    with torch.no_grad():
        found, expected = (model(IDS).logits.log_softmax(-1) for model in (written, original))
    assert (found - expected).abs().max() < tolerance
    if precision == "float32":
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_other_architectures_are_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only llama is written as GGUF here, it is 'qwen3'"):
        write_gguf(tiny["qwen"], tmp_path / "model.gguf", "float32")


def test_scaled_rotary_positions_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "llama3"}}))
    with pytest.raises(ValueError, match="of type 'llama3' are not written"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "float32")
