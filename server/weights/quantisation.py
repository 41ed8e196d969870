"""Checkpoints in 4 or 8 bits: loaded as they say, or refused by name before anything is loaded.

What a method takes (a package, a kind of device) is transformers' knowledge, which is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.checkpoint_facts import read_config


def quantisation_of(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a checkpoint; None if its weights are plain numbers."""
    config = read_config(folder)
    return config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")


def check_quantisation(folder: Path, device: str) -> None:
    """Raises `ModelLoadError` that names the method if a checkpoint is quantised in a way that cannot run here."""
    if (settings := quantisation_of(folder)) is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    method = settings.get("quant_method", "of an unnamed method")
    try:
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except Exception as exc:  # each method raises what its packages raise
        raise ModelLoadError(
            f"{folder} is quantised ({method}), which cannot be loaded on {device} here: {exc}; add what it takes, "
            "take unquantised weights, or serve it elsewhere and name that server by its url"
        ) from exc
