"""Low rank: the singular vectors of all matrices that take most error away per byte.

    Δ ≈ B A,  B = U √S,  A = √S Vᵀ,  from the singular value decomposition Δ = U S Vᵀ

With the second moment C = E[x xᵀ] of a layer's inputs, what counts is the error of its output, |(Δ - BA) x|²: Δ L is
decomposed in place of Δ, with C = L Lᵀ, and A = √S Vᵀ L⁻¹ (Wang et al., "SVD-LLM", 2024, https://arxiv.org/abs/2403.07378).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ensemble_server.server.deltas.water_filling import worth_their_bytes
from ensemble_server.server.weights.deltas import LowRank

RIDGE = 0.01  # of the mean second moment: inputs that a short text does not have are not worth nothing


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Of one matrix, all of its components, in float32: the first r of them are its best approximation of rank r.

    values: (rank,), falling; a: (rank, in) = √S Vᵀ L⁻¹; b: (out, rank) = U √S. `importance`: of an error here among
    those of other matrices.
    """

    values: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    importance: float = 1.0

    @property
    def energy(self) -> np.ndarray:
        """(rank,) float64: the error that each component takes away."""
        return self.importance * self.values.double().numpy() ** 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


def decompose(delta: torch.Tensor, moment: torch.Tensor | None = None, *, importance: float = 1.0) -> Decomposition:
    """delta: (out, in); moment: (in, in), E[x xᵀ] of the layer's inputs, or None for inputs that are all alike."""
    if moment is None:
        u, values, v = torch.linalg.svd(delta, full_matrices=False)
    else:
        root = torch.linalg.cholesky(with_ridge(moment.double(), RIDGE))
        u, values, v = torch.linalg.svd(delta.double() @ root, full_matrices=False)
        v = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    scale = values.sqrt()
    return Decomposition(values.float(), (scale[:, None] * v).float(), (u * scale).float(), importance)


def importance(weight: torch.Tensor, moment: torch.Tensor | None) -> float:
    """What an error in the output of one layer is to be multiplied by to stand beside those of others.

    weight: (out, in), of the fine-tune. With known inputs errors are relative to E |W x|²: the outputs of layers are of
    very different sizes. Without, all matrices count alike.
    """
    return 1.0 if moment is None else 1 / max(float((weight @ moment * weight).sum()), 1e-30)


def with_ridge(moment: torch.Tensor, share: float) -> torch.Tensor:
    """(n, n) -> positive definite: `share` of its mean diagonal added to the diagonal; zeros become the identity."""
    mean = float(moment.diagonal().mean())
    return moment + torch.eye(len(moment), dtype=moment.dtype) * (share * mean if mean > 0 else 1)


def low_rank(decompositions: Mapping[str, Decomposition], budget: float) -> Iterator[tuple[str, LowRank]]:
    """The matrices that get a component at least, within `budget` bytes."""
    gains = np.concatenate([one.energy for one in decompositions.values()])
    costs = np.concatenate([np.full(len(one.values), 2 * sum(one.shape)) for one in decompositions.values()])
    taken = worth_their_bytes(gains, costs, budget)
    begin = 0
    for path, one in decompositions.items():
        rank = int(taken[begin : begin + len(one.values)].sum())
        begin += len(one.values)
        if rank:
            yield path, LowRank(one.a[:rank].half(), one.b[:, :rank].half())
