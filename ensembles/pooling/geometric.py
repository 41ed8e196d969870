"""The weighted geometric mean of probabilities (log-linear pool, "logit averaging", product of experts).

    log p(x) = Σ_k w_k log p_k(x) - log Σ_y exp(Σ_k w_k log p_k(y))

A token is likely only if every member finds it likely. Weights that are all positive are scaled to sum to one, so that
N copies of a model give that model. As soon as one is negative they are taken as written: {large: 1, expert: 1,
base: -1} is proxy tuning (Liu et al., 2024), {with: 1.5, without: -0.5} classifier-free guidance (Sanchez et al., 2023)
and context-aware decoding (Shi et al., 2023), {expert: 1, amateur: -1} contrastive decoding (Li et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A negative weight must not turn "impossible" (-inf) into "certain"; e^-100 is below float32's range.
FLOOR_NATS = -100.0


def pool(logprobs: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """logprobs: (K, B, V) float32, normalised over V; weights: (K, B) finite, not all zero. -> (B, V)

    A token that a member of positive weight rules out stays ruled out, unless that leaves none: then nothing counts as
    less likely than `FLOOR_NATS`.
    """
    as_written = (weights < 0).any(0)
    weights = torch.where(as_written, weights, weights / weights.sum(0))
    pooled = _weighted_sum(logprobs, weights, is_floored=weights < 0)
    contradiction = pooled.amax(-1, keepdim=True) == -torch.inf
    if contradiction.any():
        pooled = torch.where(contradiction, _weighted_sum(logprobs, weights, is_floored=weights != 0), pooled)
    return torch.log_softmax(pooled, dim=-1)


def _weighted_sum(
    logprobs: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor, *, is_floored: torch.Tensor
) -> torch.Tensor:
    """(K, B, V), (K, B), (K, B) bool -> (B, V). Member by member, so that nothing of the size (K, B, V) is made."""
    total = torch.zeros_like(logprobs[0])
    for row, weight, floor in zip(logprobs, weights[..., None], is_floored[..., None], strict=True):
        floored = torch.where(floor, row.clamp(min=FLOOR_NATS), row)
        total += torch.where(weight == 0, 0.0, weight * floored)  # subtle: 0 * -inf would be nan
    return total
