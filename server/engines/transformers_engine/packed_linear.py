"""Linear layers whose weights are packed for oneDNN's kernels: on a CPU, four rows then cost hardly more than one.

The plain float32 path is poor between 2 and 16 rows, just where decoding lives (figures in docs/performance.md), but
for small layers: a call of the packed one takes 40 to 70 µs more, whatever it computes. The
two operators are those that torch's own compiler emits. They are private, so what they compute is checked once
against the plain path; where they are missing or wrong, layers stay as they are.

oneDNN compiles a kernel for each number of rows and shape of a layer, 1.5 ms and 0.6 MB each, and keeps 1024 of them:
prompts of all lengths leave 600 MB of code behind. Fewer are kept here, and many rows are padded to a rounder number.
"""

from __future__ import annotations

import logging
import os
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

MAX_KERNELS = 256  # decoding one model with up to 32 rows needs about 160
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's on top of it
    os.environ.setdefault(_cache, str(MAX_KERNELS))  # read when the first kernel is compiled
ROWS_HINT = 16  # the number of rows that oneDNN chooses its layout for
SMALLEST = 2**17  # weights; layers with fewer (576 x 192) are faster unpacked with 1 to 64 rows, in cache or out of it


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias, with W (out, in) float32 on the CPU. Holds the packed copy only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[-2]
        if (padding := padded(num_rows) - num_rows) == 0:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        x = nn.functional.pad(x, (0, 0, 0, padding))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "").narrow(-2, 0, num_rows)


def padded(num_rows: int) -> int:
    """How many rows are computed for so many: all numbers up to 64, then steps of at most an eighth. 65 -> 72"""
    if num_rows <= 64:
        return num_rows
    step = 1 << (num_rows - 1).bit_length() - 4
    return -(-num_rows // step) * step


def pack_linears(model: nn.Module) -> int:
    """Replace, in place, all float32 linear layers of a CPU model but small ones; returns how many. Embeddings stay."""
    if not _is_supported():
        return 0
    num_packed = 0
    for parent in list(model.modules()):
        for name, layer in cast("list[tuple[str, Any]]", list(parent.named_children())):
            if type(layer) not in (nn.Linear, Conv1D) or layer.weight.dtype != torch.float32 or layer.weight.is_meta:
                continue
            if layer.weight.device.type != "cpu" or layer.weight.numel() < SMALLEST:
                continue
            weight = layer.weight if type(layer) is nn.Linear else layer.weight.T
            setattr(parent, name, PackedLinear(weight, layer.bias))
            num_packed += 1
    return num_packed


def _is_supported() -> bool:
    try:
        weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(1, 3, 32)
        difference = (PackedLinear(weight, bias)(x) - nn.functional.linear(x, weight, bias)).abs().max()
    except (AttributeError, RuntimeError, NotImplementedError) as exc:
        logger.info("packed linears are not available in torch %s: %s", torch.__version__, exc)
        return False
    return bool(difference < 1e-4)
