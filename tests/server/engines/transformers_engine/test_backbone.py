from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from tests.conftest import make_model

VOCAB = 320


def load(folder: Path, *, dtype: str = "float32", vocab_size: int = VOCAB) -> Backbone:
    return Backbone.load(folder, dtype=dtype, device="cpu", adapters={}, vocab_size=vocab_size)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- what a forward gives ---


def test_padding_columns_get_no_mass(tiny: dict[str, Path]) -> None:
    backbone = load(tiny["deep"])  # logits are 384 wide, 320 of them have a token
    (logprobs,) = backbone.forward([Span(RowCache(), [5, 6, 7], 3)])
    assert logprobs.shape == (3, VOCAB) and logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(3))


def test_the_vocabulary_is_no_wider_than_the_embeddings(tiny: dict[str, Path]) -> None:
    assert load(tiny["llama"], vocab_size=1000).vocab_size == 336


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_give_float32_distributions(tiny: dict[str, Path], dtype: str) -> None:
    backbone = load(tiny["llama"], dtype=dtype)
    assert backbone.model.dtype == getattr(torch, dtype)
    (logprobs,) = backbone.forward([Span(RowCache(), [5, 6, 7], 1)])
    (exact,) = load(tiny["llama"]).forward([Span(RowCache(), [5, 6, 7], 1)])
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(1))
    assert (logprobs.exp() - exact.exp()).abs().max() < 0.05


def test_auto_takes_the_dtype_of_the_file(tiny: dict[str, Path]) -> None:
    assert load(tiny["llama"], dtype="auto").model.dtype == torch.float32


def test_what_the_checkpoint_says_of_itself(tiny: dict[str, Path]) -> None:
    backbone = load(tiny["gpt2"])
    assert (backbone.eos_ids, backbone.max_positions, backbone.device.type) == (frozenset({2}), 512, "cpu")


def test_several_end_of_text_ids_all_count(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(folder).eos_ids == {2, 7}


def test_longrope_ends_where_it_was_extended_from(tmp_path: Path) -> None:
    """Beyond, transformers rotates all rows of a forward by the longest of them."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    folder = make_model(
        tmp_path / "phi", "phi3", original_max_position_embeddings=64,
        rope_parameters=rope | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    assert load(folder).max_positions == 64


# --- architectures that rows cannot be batched with ---


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("gemma2", {"head_dim": 8, "sliding_window": 6}, "attention with softcap"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention with s_aux"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM has 2 layers, of which 0 use"),
        ("mamba", {"state_size": 4}, "MambaForCausalLM"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has 2 layers, of which 1 use"),
        ("llama4_text", {"head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 2}, "differ by"),
    ],
)
def test_unsupported_architectures_are_refused_when_loaded(
    tmp_path: Path, architecture: str, changes: dict[str, Any], problem: str
) -> None:
    folder = make_model(tmp_path / "model", architecture, **changes)
    assert problem in refusal(folder)


def test_they_are_refused_in_low_precision_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "bloom", n_layer=2, n_head=4)
    assert "of which 0 use" in refusal(folder, dtype="bfloat16")


# --- damage ---


def test_a_truncated_file_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be loaded as a causal LM" in refusal(folder)


def test_an_unknown_architecture_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "of_next_year"}')
    assert "cannot be loaded as a causal LM" in refusal(folder)


def test_weights_that_are_not_numbers_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "outputs are not finite; its weights are damaged" in refusal(folder)


def test_missing_weights_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    """transformers would start them at random and go on."""
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of LlamaForCausalLM, for example model.layers.1.mlp.down_proj.weight" in refusal(folder)


def test_a_head_tied_to_the_embeddings_is_not_missing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
