"""A tiny checkpoint in int8, made by hand, and the same arithmetic in plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.reference import pooled

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def make_quantised(folder: Path, source: Path, *, kept: Collection[str] = (), **config_changes: Any) -> Path:
    """`source` with the linear layers of its blocks in int8, but for those `kept` (compressed-tensors' W8A8).

    A scale per output channel in the file; a scale per row of the input is found when it runs.
    """
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if ".layers." in name and tensor.ndim == 2 and layer not in kept:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            tensors |= {name: (tensor / scale).round().to(torch.int8), f"{layer}.weight_scale": scale}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *kept],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": INT8 | {"strategy": "channel", "dynamic": False},
                "input_activations": INT8 | {"strategy": "token", "dynamic": True},
            }
        },
    } | config_changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def dequantised(folder: Path, source: Path, adapter: Path | None = None) -> Any:
    """The model of `make_quantised(folder, source)` in float32: its weights multiplied out, its inputs rounded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    tensors = load_file(folder / "model.safetensors")
    for name, layer in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            layer.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
            layer.register_forward_pre_hook(_rounded)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def _rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    [x] = inputs
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return ((x / scale).round() * scale,)


class ModelsReference:
    """Mixtures of `models`, as `tests.reference.Reference` gives them of folders."""

    def __init__(self, models: Mapping[str, Any], vocab_size: int) -> None:
        self._models = models
        self._vocab_size = vocab_size

    def __call__(
        self, pool: str, weights: Mapping[str, float], token_ids: Sequence[int], share: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        logprobs = np.stack([self._logprobs(self._models[name], token_ids) for name in weights])
        return pooled(pool, logprobs, list(weights.values()), token_ids, share)

    def _logprobs(self, model: Any, token_ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([list(token_ids)])).logits[0, :, : self._vocab_size]
        return torch.log_softmax(logits.double(), dim=-1).numpy()
