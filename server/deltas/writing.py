"""A delta's folder, there as a whole or not at all: it is filled beside its place, and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.deltas.compress import Compressed
from ensemble_server.server.deltas.difference import Difference, as_matrix, linear_layers
from ensemble_server.server.weights.delta_folder import ADAPTER, CARD, FORMAT, KEPT, PACKED
from ensemble_server.server.weights.deltas import LowRank, probe

CHAT_TEMPLATE = "chat_template.jinja"


def write_delta(
    found: Compressed, difference: Difference, out: Path, *, base: str, finetune: str, chat_template: str | None
) -> None:
    """`out` must be empty or not there. base, finetune: what they are called in delta.json. chat_template: the
    fine-tune's, if it differs from its base's; written beside the weights.

    Raises `StorageError`; nothing is at `out` then.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        partial.mkdir()
        _fill(partial, found, difference, base=base, finetune=finetune)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as exc:
        raise StorageError(f"{out} cannot be written ({exc.strerror or exc}); choose another place") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, found: Compressed, difference: Difference, *, base: str, finetune: str) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    shapes = {path: list(difference.matrices[path].shape) for path in found.matrices}
    if found.plan.method == "svd":
        _write_adapter(folder, found, difference, base)
    else:
        tensors = {
            f"{path}.{part}": tensor.contiguous()
            for path, delta in found.matrices.items()
            for part, tensor in delta.tensors().items()
        }
        save_file(tensors, folder / PACKED, metadata=metadata)
    if difference.kept:
        save_file(dict(difference.kept), folder / KEPT, metadata=metadata)
    facts = {
        "format": FORMAT,
        "made_by": f"ensemble-server {version('ensemble-server')}",
        "base": base,
        "finetune": finetune,
        **found.facts(),
        "kept": list(difference.kept),
        "left": list(difference.left),
        "shapes": shapes,
        "probes": _probes(difference, shapes),
    }
    (folder / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _probes(difference: Difference, shapes: Mapping[str, Any]) -> dict[str, list[float]]:
    layers: dict[str, Any] = dict(linear_layers(difference.base))
    return {path: probe(as_matrix(layers[path], layers[path].weight)).tolist() for path in shapes}


def _write_adapter(folder: Path, found: Compressed, difference: Difference, base: str) -> None:
    """Scaled by one: alpha = rank, for each layer and as a whole."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for path, delta in found.matrices.items():
        assert isinstance(delta, LowRank), "that is what this method makes"
        ranks[path] = len(delta.a)
        weights[f"base_model.model.{path}.lora_A.weight"] = delta.a.contiguous()
        weights[f"base_model.model.{path}.lora_B.weight"] = delta.b.contiguous()
    layers = dict(linear_layers(difference.base))
    first = layers[next(iter(ranks))]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=as_matrix(first, torch.zeros(1, 2)).shape != (1, 2),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    file = folder / ADAPTER[0]
    written = json.loads(file.read_bytes())
    written["target_modules"].sort()  # PEFT keeps a set: its order would differ from run to run
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(weights, folder / ADAPTER[1], metadata={"format": "pt"})


def _remove_abandoned(out: Path) -> None:
    """What killed processes have left beside `out`."""
    for partial in out.parent.glob(f".{out.name}.*.partial"):
        pid = partial.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(partial, ignore_errors=True)
