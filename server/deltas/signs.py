"""Signs with a scale: a bit for each weight.

    Δ ≈ s · sign(Δ),  s = mean |Δ|      the scale of least squared error

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024 (https://arxiv.org/abs/2402.10193). As
there, what one plane of signs has left can get another; which matrices get none, one or several is decided over all of
them. In the place of the paper's training of scales, with inputs of second moment C = E[x xᵀ] the scale is that of
least error of the layer's output, in closed form: s = <ΔC, sign(Δ)> / <sign(Δ) C, sign(Δ)>.

A weight that is larger than all of its matrix's scales together is never reached: planes do not converge to the delta.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import torch

from ensemble_server.server.deltas.low_rank import RIDGE, with_ridge
from ensemble_server.server.weights.deltas import SignPlanes

MAX_PLANES = 16


def sign_planes(
    deltas: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    importances: Mapping[str, float],
    budget: float,
) -> Iterator[tuple[str, SignPlanes]]:
    """The matrices that get a plane at least, within `budget` bytes. moments: path -> (in, in); importances: of an
    error of each matrix; both may be empty."""

    def gain_per_byte(path: str) -> float:
        return importances.get(path, 1.0) * _plane(left[path], weighed[path])[2] / _cost(left[path])

    weighed = {path: None if (moment := moments.get(path)) is None else with_ridge(moment, RIDGE) for path in deltas}
    left = dict(deltas)
    planes: dict[str, list[tuple[torch.Tensor, float]]] = {path: [] for path in deltas}
    queue = [(-gain_per_byte(path), path) for path in deltas]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        cost = _cost(left[path])
        if cost > budget:
            break
        budget -= cost
        signs, scale, _ = _plane(left[path], weighed[path])
        planes[path].append((signs, scale))
        left[path] = left[path] - scale * _plus_or_minus(signs)
        if len(planes[path]) < MAX_PLANES:
            heapq.heappush(queue, (-gain_per_byte(path), path))
    for path, found in planes.items():
        if found:
            signs, scales = zip(*found, strict=True)
            yield path, SignPlanes(torch.stack(signs), torch.tensor(scales))


def _plane(delta: torch.Tensor, moment: torch.Tensor | None) -> tuple[torch.Tensor, float, float]:
    """Signs (out, in) bool, their scale, and the squared error that they take away."""
    signs = delta >= 0
    if moment is None:
        return signs, float(delta.abs().mean()), float(delta.abs().mean()) ** 2 * delta.numel()
    directions = _plus_or_minus(signs)
    seen = directions @ moment
    along, length = float((seen * delta).sum()), float((seen * directions).sum())
    return signs, along / length, along**2 / length


def _plus_or_minus(signs: torch.Tensor) -> torch.Tensor:
    return signs.float() * 2 - 1


def _cost(delta: torch.Tensor) -> int:
    return -(-delta.numel() // 8) + 4
