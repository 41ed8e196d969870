"""A LoRA adapter folded into its base by PEFT: weights of their own, which mergekit can read."""

from __future__ import annotations

import warnings
from pathlib import Path

from ensemble_server.ensembles.errors import ModelLoadError


def fold_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Write base + adapter to `out` as an ordinary float32 checkpoint, without a tokenizer.

    float32, because a fold of two bfloat16 tensors would lose most of a small delta. Raises `ModelLoadError`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        if missing := [text for warning in caught if "missing adapter keys" in (text := str(warning.message))]:
            raise ValueError(missing[0])
        wrapped.merge_and_unload(safe_merge=True).save_pretrained(out)
    except Exception as exc:  # transformers and PEFT raise whatever their parts raise
        raise ModelLoadError(
            f"the adapter {adapter} cannot be folded into {base} ({type(exc).__name__}: {exc}); "
            "give the base that it was trained on"
        ) from exc
