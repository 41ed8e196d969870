"""Mixed precision over singular vectors: the more a component says, the more bits its two vectors get.

Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models", 2024
(https://arxiv.org/abs/2406.08903) give the first 2 vectors of each matrix 8 bits, the next 32 three, the rest two. Here
the same three precisions are handed out over all matrices: with σ² the error that a component takes away if it is
exact, and d the relative error of a Gaussian number at so many bits, two vectors at these leave σ² (1 - (1 - d)²).

The numbers are rounded one column after the other, each error being made up for by the columns that are still to come:
Frantar et al., "GPTQ", 2022 (https://arxiv.org/abs/2210.17323). B is fitted anew to the A that rounding has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ensemble_server.server.deltas.low_rank import RIDGE, Decomposition, with_ridge
from ensemble_server.server.deltas.water_filling import worth_their_bytes
from ensemble_server.server.weights.deltas import GROUP, MixedLowRank

# bits -> mean squared error of a Gaussian number of variance 1 on the best even grid (Max, "Quantizing for minimum
# distortion", 1960, table II, which ends before 8 bits: about that)
DISTORTION = {0: 1.0, 2: 0.1188, 3: 0.03744, 8: 0.0001}
BITS = tuple(DISTORTION)
DAMPING = 0.01
_SHARES = torch.linspace(0.4, 1.1, 15)  # of the largest number: where a grid may end


def mixed_precision(
    deltas: Mapping[str, torch.Tensor],
    decompositions: Mapping[str, Decomposition],
    moments: Mapping[str, torch.Tensor],
    budget: float,
) -> Iterator[tuple[str, MixedLowRank]]:
    """The matrices that get a component at least, within `budget` bytes. moments: path -> (in, in), may be empty."""
    allotted = allot(decompositions, budget)
    for path, bits in allotted.items():
        if len(bits):
            yield path, quantise(deltas[path], decompositions[path].a[: len(bits)], bits, moments.get(path))


def allot(decompositions: Mapping[str, Decomposition], budget: float) -> dict[str, np.ndarray]:
    """Per matrix the bits of its first components, (rank,) uint8, falling."""
    left = [1 - (1 - DISTORTION[bits]) ** 2 for bits in BITS]
    gains, costs = [], []
    for one in decompositions.values():
        num_out, num_in = one.shape
        overhead = 1 + 2 + 2 * -(-num_in // GROUP)  # the bits' number, and scales
        bytes_at = [0, *(overhead + -(-num_out * bits // 8) + -(-num_in * bits // 8) for bits in BITS[1:])]
        for step in range(1, len(BITS)):  # 0 -> 2, 2 -> 3, 3 -> 8 bits: each of them is worth less per byte
            gains.append(one.energy * (left[step - 1] - left[step]))
            costs.append(np.full(len(one.values), bytes_at[step] - bytes_at[step - 1]))
    taken = worth_their_bytes(np.concatenate(gains), np.concatenate(costs), budget)
    allotted, begin = {}, 0
    for path, one in decompositions.items():
        length = len(one.values)
        steps = taken[begin : begin + (len(BITS) - 1) * length].reshape(-1, length).sum(0)
        begin += (len(BITS) - 1) * length
        allotted[path] = np.array(BITS, dtype=np.uint8)[steps[steps > 0]]
    return allotted


def quantise(delta: torch.Tensor, a: torch.Tensor, bits: np.ndarray, moment: torch.Tensor | None) -> MixedLowRank:
    """delta: (out, in); a: (rank, in), its best right factor; bits: (rank,) uint8; moment: (in, in) or None."""
    half = torch.from_numpy(2.0 ** (bits.astype(np.float64) - 1))
    inputs = None if moment is None else with_ridge(moment.double(), RIDGE)
    a_codes, a_scales = _right_factor(a.double(), half, inputs)
    a_read = (a_codes.double() + 0.5) * a_scales.double().repeat_interleave(GROUP, dim=1)[:, : a.shape[1]]
    seen = a_read if inputs is None else a_read @ inputs  # A C
    hessian = with_ridge(seen @ a_read.T, 1e-6)  # A C Aᵀ
    b = torch.linalg.solve(hessian, seen @ delta.double().T).T  # the least squares, for this A
    b_codes, b_scales = _left_factor(b, half, hessian)
    return MixedLowRank(torch.from_numpy(bits), a_codes, a_scales, b_codes.T.contiguous(), b_scales)


def _right_factor(
    a: torch.Tensor, half: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes (rank, in) int8, scales (rank, groups) float16. Columns are inputs; without a Hessian none makes up for
    another."""
    a = a.clone()
    num_in = a.shape[1]
    codes = torch.zeros(a.shape, dtype=torch.int8)
    scales = torch.zeros(len(a), -(-num_in // GROUP), dtype=torch.float16)
    inverse = None if hessian is None else _inverse_root(hessian)
    for group, begin in enumerate(range(0, num_in, GROUP)):
        end = min(begin + GROUP, num_in)
        scales[:, group] = _scales(a[:, begin:end], half)
        scale = scales[:, group].double()
        if inverse is None:
            codes[:, begin:end] = _codes(a[:, begin:end], scale[:, None], half[:, None])
            continue
        for column in range(begin, end):
            codes[:, column] = _codes(a[:, column], scale, half)
            _make_up(a, column, (codes[:, column].double() + 0.5) * scale, inverse)
    return codes, scales


def _left_factor(b: torch.Tensor, half: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes (out, rank) int8, scales (rank,) float16. Columns are components, the most important first."""
    b = b.clone()
    codes = torch.zeros(b.shape, dtype=torch.int8)
    scales = torch.zeros(b.shape[1], dtype=torch.float16)
    inverse = _inverse_root(hessian)
    for column in range(b.shape[1]):
        scales[column] = _scales(b[:, column][None], half[column : column + 1])[0]
        scale = scales[column].double()
        codes[:, column] = _codes(b[:, column], scale, half[column])
        _make_up(b, column, (codes[:, column].double() + 0.5) * scale, inverse)
    return codes, scales


def _inverse_root(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse: its row j tells how columns after j make up for an error in j."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(with_ridge(hessian, DAMPING)))
    return torch.linalg.cholesky(inverse, upper=True)


def _make_up(weight: torch.Tensor, column: int, read: torch.Tensor, inverse: torch.Tensor) -> None:
    error = (weight[:, column] - read) / inverse[column, column]
    weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]


def _codes(numbers: torch.Tensor, scale: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    return (numbers / scale).floor().clamp(-half, half - 1).to(torch.int8)


def _scales(numbers: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """numbers: (rows, n); half: (rows,), codes on either side of zero. -> (rows,) float16, of grids of least error."""
    largest = numbers.abs().amax(1).clamp(min=1e-6)
    tried = (_SHARES[:, None].double() * (largest / half)).half().clamp(min=6e-8)  # (shares, rows)
    scale, bound = tried.double()[:, :, None], half[:, None]
    read = ((numbers / scale).floor().clamp(-bound, bound - 1) + 0.5) * scale  # (shares, rows, n)
    best = (read - numbers).square().sum(2).argmin(0)
    return tried[best, torch.arange(len(numbers))]
