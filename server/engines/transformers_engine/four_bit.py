"""Products with matrices of four bits: y = x Wᵀ with W read from an eighth of the memory that float32 takes.

    W = code · scale + offset, a code of -8 to 7 for each number, scale and offset for 32 of its row

torch has one operator for it per kind of device; that for CPUs takes bfloat16, and is fast there with AVX-512 or AVX2
only. It is private, so what it computes is checked once: `has_four_bit_products` says whether it is there and right.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

logger = logging.getLogger(__name__)

GROUP = 32  # numbers of a row that share scale and offset; also what the lengths of rows are padded to
ROWS = 16  # what the number of rows is padded to
TILES = 1  # an argument of the operator's that the CPU does not look at


class FourBitMatrix(nn.Module):
    """(out, in), codes and what they stand for. Forward: x (..., in) -> x Wᵀ (..., out), in bfloat16's precision."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> None:
        """codes: (out, in) from -8 to 7; scales, offsets: (out, groups of 32 numbers), or (out, 1) for a whole row."""
        super().__init__()
        self.num_out, self.num_in = codes.shape
        self.padding = -self.num_in % GROUP
        num_groups = (self.num_in + self.padding) // GROUP
        padded = torch.full((-(-self.num_out // ROWS) * ROWS, num_groups * GROUP), 8, dtype=torch.int32)
        padded[: self.num_out, : self.num_in] = codes.to(torch.int32) + 8
        table = torch.zeros(num_groups, len(padded), 2, dtype=torch.bfloat16)
        for part, values in enumerate((scales, offsets)):
            table[:, : self.num_out, part] = values.expand(self.num_out, num_groups).T.to(torch.bfloat16)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, TILES))
        self.register_buffer("scales", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.num_in).to(torch.bfloat16)
        if self.padding:
            rows = nn.functional.pad(rows, (0, self.padding))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        return y[:, : self.num_out].reshape(*x.shape[:-1], self.num_out).to(x.dtype)


@cache
def has_four_bit_products() -> bool:
    """Whether this torch has them, on the CPU, and computes what is said above."""
    try:
        codes, scales = torch.randint(-8, 8, (40, 80)), torch.rand(40, 3)
        x, offsets = torch.randn(5, 80), torch.randn(40, 3)
        numbers = codes * scales.repeat_interleave(GROUP, 1)[:, :80] + offsets.repeat_interleave(GROUP, 1)[:, :80]
        expected = x @ numbers.T
        difference = (FourBitMatrix(codes, scales, offsets)(x) - expected).abs().max() / expected.abs().max()
    except (AttributeError, RuntimeError, NotImplementedError) as exc:
        logger.info("torch %s has no products of four bits on this CPU: %s", torch.__version__, exc)
        return False
    return bool(difference < 0.03)
