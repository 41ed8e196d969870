"""The committed experts: small, free of machine paths, loadable, and better than the base on their own domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_LAYERS = 30
TARGET_MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

pytestmark = pytest.mark.parametrize("domain", ["code", "jargon", "shakespeare"])


def test_the_adapter_is_at_most_3_mb(domain):
    assert (ROOT / f"experts/{domain}/adapter_model.safetensors").stat().st_size <= 3_000_000


def test_the_config_names_the_base_by_its_hub_id_and_no_machine_path(domain):
    config = json.loads((ROOT / f"experts/{domain}/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    assert config["target_modules"] == TARGET_MODULES
    assert not [value for value in config.values() if isinstance(value, str) and value.startswith(("/", "~", "."))]


def test_the_weights_cover_every_linear_layer_of_every_block(domain):
    rank = json.loads((ROOT / f"experts/{domain}/adapter_config.json").read_text())["r"]
    weights = load_file(ROOT / f"experts/{domain}/adapter_model.safetensors")
    assert len(weights) == NUM_LAYERS * len(TARGET_MODULES) * 2
    for name, weight in weights.items():
        assert weight.dtype == torch.float16
        assert rank in weight.shape
        assert torch.isfinite(weight).all(), name
        assert weight.any(), f"{name} is all zero: it was never trained"


def test_the_model_card_states_data_licence_command_and_figures(domain):
    card = (ROOT / f"experts/{domain}/README.md").read_text()
    for needed in (f"data/text/{domain}_train.txt", "Licence", f"python experts/train.py {domain}", "Bits per byte"):
        assert needed in card


@pytest.mark.slow
def test_the_expert_beats_the_base_on_its_own_domain(domain):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ensemble_server.server.weights.checkpoints import resolve_checkpoint
    from experts.bits_per_byte import score_windows

    checkpoint = resolve_checkpoint(BASE, relative_to=ROOT)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expert = PeftModel.from_pretrained(base, ROOT / "experts" / domain).eval()
    text = (ROOT / f"data/text/{domain}_test.txt").read_text(encoding="utf-8")[:8192]
    with expert.disable_adapter():
        base_bpb = score_windows(expert, tokenizer, text).bpb
    assert score_windows(expert, tokenizer, text).bpb < base_bpb
