"""Weights from a checkpoint, or a clear refusal: what transformers makes of a folder is not always what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.quantisation import quantisation_of


def load_causal_lm(folder: Path, *, device: str | None = None, **settings: Any) -> PreTrainedModel:
    """`settings` go to transformers' `from_pretrained`.

    Raises `ModelLoadError` if the folder cannot be loaded or lacks weights; the caller knows the member's name.
    """
    if device is not None and quantisation_of(folder) is not None:  # such weights are made on their device
        settings, device = {**settings, "device_map": {"": device}}, None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **settings
        )
        model, report = loaded  # a pair, since its report was asked for
        if device is not None:
            model = model.to(device)
    except Exception as exc:  # transformers and its packages raise what they like: damage comes as a dozen types
        raise ModelLoadError(f"{folder} cannot be loaded as a causal LM ({type(exc).__name__}: {exc})") from exc
    if missing := sorted(report["missing_keys"]):  # transformers has filled them with random numbers
        raise ModelLoadError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; "
            "download or save the model again"
        )
    return model
