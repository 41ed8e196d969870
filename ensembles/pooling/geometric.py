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


def pool(
    logprobs: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor, known: torch.Tensor | None = None
) -> torch.Tensor:
    """logprobs: (K, B, V) float32, normalised over V; weights: (K, B) finite, not all zero. -> (B, V)

    A token that a member of positive weight rules out stays ruled out, unless that leaves none: then nothing counts as
    less likely than `FLOOR_NATS`.

    `known`: (K, B, V) bool, the tokens that each member has. Who lacks a token has no opinion of it: it gets

        Σ_{k has x} w_k log p_k(x) / Σ_{k has x} w_k

    before all is normalised, which is the pool of those that have it. Where a weight is negative, a token that some
    member of the pool lacks is ruled out.
    """
    as_written = (weights < 0).any(0)
    weights = torch.where(as_written, weights, weights / weights.sum(0))
    pooled = _weighted_sum(logprobs, weights, is_floored=weights < 0)
    contradiction = pooled.amax(-1, keepdim=True) == -torch.inf
    if contradiction.any():
        pooled = torch.where(contradiction, _weighted_sum(logprobs, weights, is_floored=weights != 0), pooled)
    if known is not None:
        pooled = _with_tokens_of_some(pooled, logprobs, weights, known, as_written)
    return torch.log_softmax(pooled, dim=-1)


def _with_tokens_of_some(
    pooled: torch.Tensor,
    logprobs: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor,
    known: torch.Tensor,
    as_written: torch.Tensor,
) -> torch.Tensor:
    """`pooled` (B, V), not normalised, with the scores of tokens that not all members have. as_written: (B,) bool."""
    opinion, weight_of_opinion = torch.zeros_like(pooled), torch.zeros_like(pooled)
    is_lacking = torch.zeros_like(pooled, dtype=torch.bool)
    for row, weight, has in zip(logprobs, weights[..., None], known, strict=True):
        counts = has & (weight != 0)
        opinion += torch.where(counts, weight * row, 0.0)
        weight_of_opinion += torch.where(counts, weight, 0.0)
        is_lacking |= ~has & (weight != 0)
    is_possible = (weight_of_opinion > 0) & ~as_written[:, None]
    score = torch.where(is_possible, opinion / weight_of_opinion, -torch.inf)
    return torch.where(is_lacking, score, pooled)


def _weighted_sum(
    logprobs: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor, *, is_floored: torch.Tensor
) -> torch.Tensor:
    """(K, B, V), (K, B), (K, B) bool -> (B, V). Member by member, so that nothing of the size (K, B, V) is made."""
    total = torch.zeros_like(logprobs[0])
    for row, weight, floor in zip(logprobs, weights[..., None], is_floored[..., None], strict=True):
        floored = torch.where(floor, row.clamp(min=FLOOR_NATS), row)
        total += torch.where(weight == 0, 0.0, weight * floored)  # subtle: 0 * -inf would be nan
    return total
