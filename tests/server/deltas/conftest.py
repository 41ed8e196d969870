"""A base and full fine-tunes of it, tiny: every weight moved a little, matrices more in a few directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.server.deltas.difference import Difference, difference

Tune = Callable[..., Path]


@pytest.fixture(scope="session")
def tune(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tune:
    return lambda base="llama", **changes: make_finetune(tmp_path_factory.mktemp("tuned"), tiny[base], **changes)


@pytest.fixture(scope="session")
def tuned(tune: Tune) -> Path:
    return tune()


@pytest.fixture(scope="session")
def changed(tuned: Path, tiny: dict[str, Path]) -> Difference:
    return difference(tuned, tiny["llama"])


def make_finetune(
    folder: Path, base: Path, *, seed: int = 7, scale: float = 0.015, only: str = "", tokenizer: Path | None = None
) -> Path:
    """A copy of `base` in which all weights whose name contains `only` have moved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only not in name:
                continue
            weight.add_(torch.randn_like(weight), alpha=scale / 3)
            if weight.ndim == 2 and weight.shape[0] < 300:
                weight.add_(torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]), alpha=scale)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer or base).save_pretrained(folder)
    return folder
