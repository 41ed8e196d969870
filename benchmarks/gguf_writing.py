"""A checkpoint as a .gguf file of given precision, so that llama.cpp computes with the very weights that we load.

The format is that of the `gguf` package (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Only the weights
and what the arithmetic needs are written; text is tokenized elsewhere, so the file says that it has no tokenizer.
Llama's architecture only, without biases and without scaled rotary positions: enough for the demo's model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

Precision = Literal["float32", "float16", "q8_0"]
TYPES: dict[Precision, GGMLQuantizationType] = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
BLOCK = 32  # values of a row that share a scale in q8_0


def write_gguf(checkpoint: Path, file: Path, precision: Precision) -> None:
    """As llama.cpp's own conversions, norms stay float32, and rows that q8_0 cannot cut into blocks of 32 are float16.

    Raises `ValueError` for a checkpoint of another kind, or with weights that have no place in the file."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _check(config, checkpoint)
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)
    for name, weight in _weights(checkpoint):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or name.endswith(".bias"):
            raise ValueError(f"{checkpoint}: {name} has no place in a llama of the GGUF format")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, num_heads if "q_proj" in name else num_kv_heads)
        values, kind = weight.contiguous().numpy(), TYPES[precision]
        if weight.dim() == 1:
            kind = GGMLQuantizationType.F32
        elif kind is GGMLQuantizationType.Q8_0 and weight.shape[-1] % BLOCK:
            kind = GGMLQuantizationType.F16
        writer.add_tensor(known, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: dict[str, Any], checkpoint: Path) -> None:
    if config.get("model_type") != "llama":
        raise ValueError(f"{checkpoint}: only llama is written as GGUF here, it is {config.get('model_type')!r}")
    if (kind := _rope(config).get("rope_type", "default")) != "default":
        raise ValueError(f"{checkpoint}: rotary positions of type {kind!r} are not written as GGUF here")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """float32, file by file."""
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        with contextlib.ExitStack() as stack:
            tensors: Any = stack.enter_context(safe_open(file, framework="pt"))  # untyped
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                yield name, tensors.get_tensor(name).float()


def _interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of queries or keys as GGUF has them: what is turned together, i and i + head_dim / 2, side by side."""
    halves = weight.view(num_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)
