"""Texts that are read to calibrate a delta, and to measure what it has lost.

Lengths are in tokens. A text is cut into windows as in comparisons; of a long one, windows are taken evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.documents import read_documents
from ensemble_server.server.compare.measures.windows import Window, cut_windows
from ensemble_server.server.deltas.difference import Difference, as_matrix, linear_layers
from ensemble_server.server.weights.deltas import MatrixDelta
from ensemble_server.server.weights.view import Surface

WINDOW = 512


@dataclass(frozen=True)
class Loss:
    """What a delta has lost, at every token of a text, against the whole fine-tune.

    KL(fine-tune ‖ base + delta) in nats per token: its mean, and what 99% of the tokens are below. `same_argmax`: the
    part of the tokens where both expect the same one most. Bits per byte of the text: of the base, the fine-tune, and
    the base with the delta. `base_kl_mean`: KL(fine-tune ‖ base), to measure by.
    """

    num_tokens: int
    kl_mean: float
    kl_p99: float
    same_argmax: float
    bpb: float
    finetune_bpb: float
    base_bpb: float
    base_kl_mean: float


def windows_of(file: Path, surface: Surface, *, max_tokens: int) -> list[Window]:
    """Raises `ConfigError` for a file that cannot be read or has less than two tokens."""
    windows = cut_windows(surface, read_documents(file), window=WINDOW)
    if not windows:
        raise ConfigError(f"{file}: has less than two tokens; give a longer text")
    count = max(1, max_tokens // WINDOW)
    return [windows[i * len(windows) // count] for i in range(count)] if count < len(windows) else windows


@torch.inference_mode()
def input_moments(model: PreTrainedModel, windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Path of each linear layer -> (in, in), the mean of x xᵀ over the tokens that it reads."""
    sums: dict[str, torch.Tensor] = {}
    last: list[torch.Tensor] = [
        torch.empty(0),
        torch.empty(0),
    ]  # an input, and its moment: layers side by side share it

    def hook(path: str) -> Any:
        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0] is not last[0]:
                rows = inputs[0].flatten(0, -2).float()
                last[:] = inputs[0], rows.T @ rows
            sums[path] = sums[path] + last[1] if path in sums else last[1]

        return note

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in linear_layers(model)]
    try:
        for window in windows:
            model(input_ids=torch.tensor([window.token_ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = sum(len(window.token_ids) for window in windows)
    return {path: total / num_tokens for path, total in sums.items()}


class Yardstick:
    """The base and the fine-tune on one text; deltas are measured against them."""

    def __init__(self, difference: Difference, windows: Sequence[Window]) -> None:
        self._difference = difference
        self._windows = windows
        self._of_base: tuple[float, float] | None = None  # bits per byte, mean KL

    def measure(self, matrices: Mapping[str, MatrixDelta]) -> Loss:
        """Of the base with these matrices, and with what the difference keeps."""
        if self._of_base is None:
            bare = self._read()
            self._of_base = bare.bpb, float(bare.kl.mean())
        with _applied(self._difference, matrices):
            read = self._read()
        return Loss(
            num_tokens=len(read.kl),
            kl_mean=float(read.kl.mean()),
            kl_p99=float(read.kl.quantile(0.99)),
            same_argmax=float(read.is_same.float().mean()),
            bpb=read.bpb,
            finetune_bpb=read.finetune_bpb,
            base_bpb=self._of_base[0],
            base_kl_mean=self._of_base[1],
        )

    @torch.inference_mode()
    def _read(self) -> _Read:
        kl, is_same, nats, num_bytes = [], [], torch.zeros(2, dtype=torch.float64), 0
        width = self._difference.surface.vocab_size
        for window in self._windows:
            ids = torch.tensor([window.token_ids])
            first = window.first_scored - 1
            expected, found = (
                torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, first:-1, :width], dim=-1)
                for model in (self._difference.finetune, self._difference.base)
            )
            kl.append(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1))
            is_same.append(expected.argmax(-1) == found.argmax(-1))
            targets = ids[0, window.first_scored :, None]
            nats -= torch.stack([rows.gather(1, targets).double().sum() for rows in (expected, found)])
            num_bytes += int(window.num_bytes.sum())
        expected_bpb, bpb = (nats / log(2) / num_bytes).tolist()
        return _Read(torch.cat(kl).clamp(min=0), torch.cat(is_same), bpb, expected_bpb)


@dataclass(frozen=True, eq=False)
class _Read:
    kl: torch.Tensor  # (num_tokens,)
    is_same: torch.Tensor  # (num_tokens,) bool
    bpb: float
    finetune_bpb: float


@contextmanager
def _applied(difference: Difference, matrices: Mapping[str, MatrixDelta]) -> Iterator[None]:
    """The difference's base with a delta on it; as it was, afterwards."""
    layers: dict[str, Any] = dict(linear_layers(difference.base))
    parameters = dict(difference.base.named_parameters())
    before = {f"{path}.weight": parameters[f"{path}.weight"].data for path in matrices}
    before |= {name: parameters[name].data for name in difference.kept}
    try:
        for path, delta in matrices.items():
            weight = parameters[f"{path}.weight"]
            weight.data = weight.data + as_matrix(layers[path], delta.dense())
        for name, kept in difference.kept.items():
            parameters[name].data = kept.float()
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
