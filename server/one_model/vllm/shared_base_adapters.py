"""A PEFT folder as low-rank changes to the linear layers of its base, by the names that transformers gives them.

    y = W x + B A x        with PEFT's scaling folded into B

PEFT itself says which layers an adapter has and how each is scaled (its patterns of ranks and alphas, rsLoRA); for that
the base is built without memory for weights. Nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.adapters import refuse_beyond_plain_lora

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LowRank:
    """One adapter's change to one linear layer. `a`: (rank, in), `b`: (out, rank), scaled; float32 on the CPU."""

    a: torch.Tensor
    b: torch.Tensor


def read_adapter(name: str, folder: Path, base: PreTrainedConfig) -> dict[str, LowRank]:
    """The layers that the adapter of member `name` changes: `model.layers.0.self_attn.q_proj` -> its change.

    Raises `ModelLoadError` naming the member for anything but finite, plain LoRA on linear layers, and for files that
    do not hold exactly the layers that their config promises.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    try:
        config = PeftConfig.from_pretrained(str(folder))
        refuse_beyond_plain_lora(name, config)
        config.inference_mode = True
        with torch.device("meta"):
            wrapped = PeftModel(AutoModelForCausalLM.from_config(base), config, low_cpu_mem_usage=True)
        with torch.device("cpu"):
            weights = load_peft_weights(str(folder), device="cpu")
    except ModelLoadError:
        raise
    except Exception as exc:
        raise ModelLoadError(
            f"adapter of member {name!r} at {folder} cannot be read ({type(exc).__name__}: {exc}); "
            "is it a PEFT folder (adapter_config.json, adapter_model.safetensors) trained on this base?"
        ) from exc
    layers = {
        path: layer
        for path, layer in wrapped.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and layer.active_adapters
    }
    changes = {path: _low_rank(name, path, layer, weights) for path, layer in layers.items()}
    foreign = weights.keys() - {key for path in layers for key in _keys(path)}
    if foreign:
        raise ModelLoadError(
            f"adapter of member {name!r} at {folder} has {len(foreign)} weights that fit no layer of its base, "
            f"for example {min(foreign)}"
        )
    return changes


def _keys(path: str) -> tuple[str, str]:
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def _low_rank(name: str, path: str, layer: Any, weights: Mapping[str, torch.Tensor]) -> LowRank:
    """layer: PEFT's `LoraLayer`, whose shapes and scaling count; its weights are empty."""
    if layer.lora_embedding_A:
        raise ModelLoadError(
            f"adapter of member {name!r} changes {path}, an embedding; "
            "members of one base can differ in its linear layers only, so merge the adapter into a model of its own"
        )
    [adapter] = layer.lora_A
    shapes = [tuple(part[adapter].weight.shape) for part in (layer.lora_A, layer.lora_B)]
    found: list[torch.Tensor] = []
    for key, shape in zip(_keys(path), shapes, strict=True):
        weight = weights.get(key)
        if weight is None:
            raise ModelLoadError(f"adapter of member {name!r} lacks {key}, which its config promises; save it again")
        if tuple(weight.shape) != shape:
            raise ModelLoadError(
                f"adapter of member {name!r}: {key} has the shape {tuple(weight.shape)}, but its config and base ask "
                f"for {shape}; was it trained on this base?"
            )
        if not weight.isfinite().all():
            raise ModelLoadError(
                f"adapter of member {name!r}: {key} is not finite; the file is damaged or training diverged"
            )
        found.append(weight)
    a, b = found
    return LowRank(a.float(), b.float() * layer.scaling[adapter])
