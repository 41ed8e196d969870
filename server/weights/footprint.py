"""How large a checkpoint is and what its KV cache takes, read from config.json and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.checkpoint_facts import read_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}


@dataclass(frozen=True)
class Weights:
    """`num_bytes`: as stored."""

    num_parameters: int
    num_bytes: int

    def bytes_as(self, dtype: str) -> int:
        """In memory, if loaded as `dtype` (as in the config: "auto" keeps what is stored)."""
        return self.num_bytes if dtype == "auto" else self.num_parameters * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Shape:
    """What the size of a KV cache follows from. `max_positions`: tokens that the model was made for, if it says so."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None

    def kv_bytes(self, num_tokens: int, bytes_per_number: int) -> int:
        """Keys and values of all layers. An upper bound: layers with a sliding window keep fewer tokens."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * num_tokens * bytes_per_number


def read_weights(folder: Path) -> Weights:
    """Of all *.safetensors in `folder`. Raises `ModelLoadError` if there are none or one is damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        state = "holds no *.safetensors" if folder.is_dir() else "is no folder"
        raise ModelLoadError(f"{folder} {state}; sizes are read from a folder with *.safetensors")
    tensors = [(prod(shape), bits) for file in files for shape, bits in _tensors(file)]
    return Weights(sum(count for count, _ in tensors), sum(count * bits // 8 for count, bits in tensors))


def _tensors(file: Path) -> Iterator[tuple[list[int], int]]:
    """Shape and bits per number of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                tensor = stored.get_slice(name)
                yield tensor.get_shape(), _STORED_BITS.get(tensor.get_dtype(), 8)
    except (SafetensorError, OSError) as exc:
        raise ModelLoadError(f"{file} is not a whole safetensors file ({exc})") from exc


def read_shape(folder: Path) -> Shape:
    """From config.json, under the names that Llama-like and GPT-2-like models use. Raises `ModelLoadError`."""
    config = read_config(folder)
    config = config.get("text_config", config)

    def first(*keys: str) -> int | None:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), None)

    num_layers, num_heads = first("num_hidden_layers", "n_layer"), first("num_attention_heads", "n_head")
    width = first("hidden_size", "n_embd")
    if num_layers is None or num_heads is None or width is None:
        raise ModelLoadError(
            f"{folder / 'config.json'} does not tell layers, heads and width under names that are known here"
        )
    return Shape(
        num_layers=num_layers,
        num_kv_heads=first("num_key_value_heads") or num_heads,
        head_dim=first("head_dim") or width // num_heads,
        max_positions=first("max_position_embeddings", "n_positions"),
    )


def as_count(number: int) -> str:
    """134515008 -> "134.5 M" """
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def as_bytes(number: int) -> str:
    """538060032 -> "538.1 MB" """
    return f"{as_count(number)}B" if number >= 1000 else f"{number} B"
