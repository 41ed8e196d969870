"""Drop and rescale: a random few of a delta's weights, each enlarged so that the expected delta is the whole one.

    Δ_ij / density with probability `density`, else 0

Yu et al., "Language Models are Super Mario", 2024 (https://arxiv.org/abs/2311.03099). It leaves an error of variance
Δ² (1 / density - 1) in each weight, which averages out over a layer's many inputs while deltas are small. All matrices
get the same density, as there: whatever is known of a weight must not decide whether it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ensemble_server.server.weights.deltas import Sparse, gaps_of

BYTES_PER_VALUE = 2


def drop_and_rescale(deltas: Mapping[str, torch.Tensor], budget: float, *, seed: int) -> Iterator[tuple[str, Sparse]]:
    """Every matrix, within `budget` bytes; one of which no weight is left is left out."""
    random = np.random.default_rng(seed)
    bytes_per_weight = budget / sum(delta.numel() for delta in deltas.values())
    density = density_for(8 * bytes_per_weight)
    for path, delta in deltas.items():
        chosen = random.choice(delta.numel(), size=int(density * delta.numel()), replace=False)  # in random order
        while (excess := _num_bytes(chosen) - bytes_per_weight * delta.numel()) > 0:  # gaps are random, too
            chosen = chosen[: -max(1, int(excess / (BYTES_PER_VALUE + 1)))]
        if len(chosen):
            yield path, _rescaled(delta, torch.from_numpy(np.sort(chosen)))


def density_for(bits_per_weight: float) -> float:
    """The part of the weights that a budget pays for: a value each, and a byte for the gap before it, or several."""
    low, high = 0.0, 1.0
    for _ in range(40):
        density = (low + high) / 2
        is_far = (1 - density) ** 255  # the chance that a gap takes a byte more
        num_bytes = density * (BYTES_PER_VALUE + 1 / (1 - is_far)) if density else 0
        low, high = (density, high) if 8 * num_bytes <= bits_per_weight else (low, density)
    return low if low < 1 - 1e-6 else 1.0


def _num_bytes(chosen: np.ndarray) -> int:
    return BYTES_PER_VALUE * len(chosen) + len(gaps_of(torch.from_numpy(np.sort(chosen))))


def _rescaled(delta: torch.Tensor, places: torch.Tensor) -> Sparse:
    density = len(places) / delta.numel()
    return Sparse((delta.shape[0], delta.shape[1]), places, (delta.flatten()[places] / density).half())
