"""PEFT folders read as low-rank changes: against PEFT's own merging; what is no plain, whole LoRA is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.one_model.vllm.shared_base_adapters import read_adapter
from tests.conftest import make_adapter

KINDS = {
    "all linears": {},
    "some linears": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ranks and alphas by pattern": {"rank_pattern": {"layers.0.*q_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    "rsLoRA": {"use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_plus_its_changes_is_what_peft_merges(kind, tiny, tmp_path):
    from peft import PeftModel

    folder = make_adapter(tmp_path / "adapter", tiny["llama"], seed=7, rank=3, **KINDS[kind])
    changes = read_adapter("m", folder, AutoConfig.from_pretrained(tiny["llama"]))
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), folder).merge_and_unload()
    num_changed = 0
    for name, layer in merged.named_modules():
        if isinstance(layer, torch.nn.Linear):
            expected = layer.weight - base.get_submodule(name).weight
            num_changed += bool(expected.abs().max() > 0)
            found = changes[name].b @ changes[name].a if name in changes else torch.zeros_like(expected)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert num_changed == len(changes) > 0


def damaged(tiny: dict[str, Path], folder: Path, change) -> Path:
    """A copy of an adapter whose weights went through `change`."""
    make_adapter(folder, tiny["llama"], seed=7)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return folder


def test_a_weight_that_is_not_there_is_missed(tiny, tmp_path):
    folder = damaged(tiny, tmp_path / "a", lambda weights: weights.pop(min(weights)))
    with pytest.raises(ModelLoadError, match=r"'m' lacks .*lora_A"):
        read_adapter("m", folder, AutoConfig.from_pretrained(tiny["llama"]))


def test_a_weight_of_no_layer_is_refused(tiny, tmp_path):
    folder = damaged(tiny, tmp_path / "a", lambda weights: weights.update({"base_model.model.x.weight": torch.ones(2)}))
    with pytest.raises(ModelLoadError, match=r"'m' .* 1 weights that fit no layer .* base_model\.model\.x\.weight"):
        read_adapter("m", folder, AutoConfig.from_pretrained(tiny["llama"]))


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    folder = damaged(tiny, tmp_path / "a", lambda weights: weights[max(weights)].fill_(torch.nan))
    with pytest.raises(ModelLoadError, match=r"'m': .* is not finite"):
        read_adapter("m", folder, AutoConfig.from_pretrained(tiny["llama"]))


def test_an_adapter_of_another_base_is_refused(tiny):
    with pytest.raises(ModelLoadError, match=r"'red'.* shape .* trained on this base"):
        read_adapter("red", tiny["red"], AutoConfig.from_pretrained(tiny["llama"], intermediate_size=64))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_what_is_no_low_rank_change_of_a_linear_layer_is_refused(changes, tiny, tmp_path):
    folder = make_adapter(tmp_path / "adapter", tiny["llama"], seed=7, **changes)
    with pytest.raises(ModelLoadError, match=r"'m'.*merge"):
        read_adapter("m", folder, AutoConfig.from_pretrained(tiny["llama"]))


def test_a_folder_without_an_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ModelLoadError, match=r"'m' .* is it a PEFT folder"):
        read_adapter("m", tmp_path, AutoConfig.from_pretrained(tiny["llama"]))
