"""Weights kept as fp16, arithmetic in float32: a layer that few rows go through takes as long as reading its weights
from memory does, and so reads half as much.

Checkpoints are mostly stored in 16 bits. An fp16 weight is itself; a bfloat16 one has fewer digits than fp16 and fits
unless it is huge (fp16 ends at 65504) or tiny: below 7.6e-6 it is moved by up to 3e-8, about what float32 rounds when
it adds up the products of a tensor's larger weights. So every weight is looked at, and only tensors with no weight
moved by a millionth of the largest are kept this way. Others are rounded if the config says so
(`engine.weights: half`), before anything is computed with them.

The operators are fbgemm's, which torch has for its first kind of dynamic quantisation: on CPUs with AVX2. They are
fast, but packing for them is not: 30 to 90 ns per weight, ten seconds for 135 million. So models begin with the layers
that `packed_linear` makes, and `halving` replaces them one by one in the engine's spare time, each compared with what
it replaces. There is one copy of a layer, for all numbers of rows: hundreds are up to a tenth slower from fp16, which
is not worth a second copy of twice the size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ensemble_server.server.engines.transformers_engine.packed_linear import PackedLinear

logger = logging.getLogger(__name__)

WeightsRule = Literal["exact", "half", "full"]
"""Which tensors are kept as fp16: those that it holds exactly (see `is_exact`), all of them (rounded), or none."""

EXACT = 2**-20  # of a tensor's largest weight; float32 rounds each product of it by 2**-24
PIECE = 8192  # outputs of a layer that are packed at once; a whole head would take seconds
TOLERANCE = 1e-4  # of a layer's largest output


class HalfLinear(nn.Module):
    """y = x Wᵀ + bias, with W (out, in) float32 on the CPU, exact in fp16. Holds only packed fp16 copies, of `pieces`
    of it that lie side by side."""

    def __init__(self, pieces: list[Any], weight: torch.Tensor) -> None:
        super().__init__()
        self._pieces = pieces
        self.weight = _only_described(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._pieces) == 1:
            return torch.ops.quantized.linear_dynamic_fp16(x, self._pieces[0])
        return torch.cat([torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in self._pieces], dim=-1)


class HalfEmbedding(nn.Module):
    """Rows of a table (num, width) float32 on the CPU, exact in fp16. Gives float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._table = weight.detach().half()
        self.weight = _only_described(weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self._table).float()


@dataclass(frozen=True)
class Rounding:
    """What fp16 makes of `num_layers` that it does not hold exactly: `deviation` is that of the weight that it changes
    most, in `layer`."""

    num_layers: int
    layer: str
    deviation: float

    @classmethod
    def of(cls, deviations: dict[str, float]) -> Rounding | None:
        """deviations: layer -> its largest. None if there are none."""
        if not deviations:
            return None
        layer = max(deviations, key=lambda name: deviations[name])
        return cls(len(deviations), layer, deviations[layer])

    def __str__(self) -> str:
        return f"{self.num_layers} layers, by at most {self.deviation:.2g} (in {self.layer})"


@cache
def is_supported() -> bool:
    """Whether this torch and this CPU compute with fp16 weights, and rightly."""
    weight, bias, x = torch.randn(48, 32).half().float(), torch.randn(48), torch.randn(1, 3, 32)
    try:
        return _computes(HalfLinear([_packed(weight, bias)], weight), weight, bias, x)
    except (AttributeError, RuntimeError, NotImplementedError) as exc:
        logger.info("weights cannot be kept as fp16 by torch %s: %s", torch.__version__, exc)
        return False


def deviation(weight: torch.Tensor) -> float:
    """By how much fp16 changes the weight that it changes most; inf or NaN for what it does not hold at all."""
    return float((weight.half().float() - weight).abs().max())


def is_exact(weight: torch.Tensor) -> bool:
    """Whether all weights are finite, and fp16 moves none by a millionth of the largest."""
    return deviation(weight) <= EXACT * float(weight.abs().max())


def halve_embeddings(model: nn.Module) -> int:
    """Replace, in place, all float32 tables of a CPU model that fp16 holds exactly; returns how many."""
    num_halved = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Embedding and _is_plain(layer) and is_exact(layer.weight):
                setattr(parent, name, HalfEmbedding(layer.weight))
                num_halved += 1
    return num_halved


@torch.no_grad()
def round_to_half(model: nn.Module) -> Rounding | None:
    """Round, in place, what could be kept as fp16 but for its digits. Tensors with weights beyond fp16's range stay.

    None if nothing had to be rounded. For a model whose layers are not packed yet.
    """
    deviations = {}
    for name, layer in model.named_modules():
        if not _is_plain(layer):
            continue
        weight: Any = layer.weight
        change = deviation(weight)
        if 0 < change < float("inf"):
            weight.copy_(weight.half())
            deviations[name] = change
    return Rounding.of(deviations)


def halving(model: nn.Module) -> Iterator[None]:
    """Replaces, in place, all linear layers of a CPU model that fp16 holds exactly, a piece with each `next`.

    Between two of them the model can be used, and computes the same. Raises `ArithmeticError` for a layer that does
    not compute what it is to replace.
    """
    if not is_supported():
        return
    num_halved, deviations = 0, {}
    for path, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if (parts := _dense(layer)) is None:
                continue
            weight, bias = parts
            if is_exact(weight):
                biases = [None] * len(weight) if bias is None else bias.split(PIECE)
                pieces = []
                for piece, of_piece in zip(weight.split(PIECE), biases, strict=False):
                    pieces.append(_packed(piece, of_piece))
                    yield
                halved = HalfLinear(pieces, weight)
                if not _computes(halved, weight, bias, torch.randn(1, 2, weight.shape[1])):
                    raise ArithmeticError(f"{path}.{name} computes something else with its weights as fp16")
                setattr(parent, name, halved)
                num_halved += 1
            else:
                deviations[f"{path}.{name}"] = deviation(weight)
                yield
    rounding = Rounding.of(deviations)
    logger.info(
        "%d linear layers of %s are kept as fp16%s",
        num_halved,
        type(model).__name__,
        f"; it would change {rounding}, which stay float32 (engine.weights)" if rounding else "",
    )


def _dense(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (out, in) and bias of a linear layer that could be kept as fp16."""
    if isinstance(layer, PackedLinear):
        return layer.weight.to_dense(), layer.bias
    if type(layer) is nn.Embedding or not _is_plain(layer):
        return None
    plain = cast("nn.Linear", layer)
    weight = plain.weight.detach()
    return weight if type(layer) is nn.Linear else weight.T.contiguous(), plain.bias


def _is_plain(layer: nn.Module) -> bool:
    """A linear layer or a table, float32, on the CPU, that does nothing besides."""
    if type(layer) not in (nn.Linear, Conv1D, nn.Embedding) or getattr(layer, "max_norm", None) is not None:
        return False
    weight: Any = layer.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    bias = None if bias is None else bias.detach().contiguous()
    return torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)


def _computes(layer: HalfLinear, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> bool:
    expected = nn.functional.linear(x, weight, bias)
    return float((layer(x) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _only_described(weight: torch.Tensor) -> torch.Tensor:
    """Shape, dtype and device of a weight, for architectures that ask for them; no numbers."""
    return torch.tensor(torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
