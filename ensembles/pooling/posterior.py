"""The Bayesian mixture: weights that follow the evidence, with a fixed share that lets a member come back.

    w_k(t+1) = (1 - α) · w_k(t) p_k(x_t) / Σ_j w_j(t) p_j(x_t)  +  α · w_k(0)

The pooled distribution at step t is the arithmetic one under w(t). For any text of T tokens its loss (-log p, nats) is
at most that of any single member k plus

    ln 1/w_k(0) + (T - 1) · ln 1/(1 - α + α w_k(0))        which for α = 0 and K equal priors is ln K,

and at most that of any sequence of members with S switches plus S · ln 1/(α min_k w_k(0)) more.

References: Littlestone & Warmuth, "The weighted majority algorithm", 1994; Herbster & Warmuth, "Tracking the best
expert", 1998 (here the share flows back to the prior, their variant with a start vector).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Weights = np.ndarray  # (K,) float64, sums to one, as `ensembles.pooling.effective_weights` gives them

# Where float64 ends: a member that falls further behind would be forgotten, and could not come back when it is right
# again. Its text would then cost more than the bound says.
SMALLEST_WEIGHT = 1e-300


def update(weights: Weights, token_logprobs: Sequence[float] | np.ndarray, prior: Weights, share: float) -> Weights:
    """The weights after one token that member k gave log-probability `token_logprobs[k]` (nats).

    If every member ruled the token out (all -inf) the weights stay: the token says nothing about who is better.
    """
    logprobs = np.asarray(token_logprobs, dtype=np.float64)
    best = logprobs[weights > 0].max(initial=-math.inf)
    if best == -math.inf:
        return weights
    posterior = weights * np.exp(np.minimum(logprobs - best, 0.0))
    moved = (1 - share) * (posterior / posterior.sum()) + share * prior
    return np.where(prior > 0, np.maximum(moved, SMALLEST_WEIGHT), 0.0)


def track(weights: Weights, token_logprobs: np.ndarray, prior: Weights, share: float) -> np.ndarray:
    """Weights before each of T tokens and after the last. token_logprobs: (K, T) nats. -> (K, T + 1)"""
    path = np.empty((len(weights), token_logprobs.shape[1] + 1))
    path[:, 0] = weights
    for t in range(token_logprobs.shape[1]):
        path[:, t + 1] = update(path[:, t], token_logprobs[:, t], prior, share)
    return path


def update_rows(weights: torch.Tensor, token_logprobs: torch.Tensor, prior: torch.Tensor, share: float) -> torch.Tensor:
    """`update` for many texts at once, on any device. All (..., K) float64; `prior` may be (K,)."""
    best = token_logprobs.masked_fill(weights <= 0, -math.inf).amax(-1, keepdim=True)
    is_ruled_out = best == -math.inf
    posterior = weights * (token_logprobs - best.masked_fill(is_ruled_out, 0.0)).clamp(max=0.0).exp()
    moved = (1 - share) * (posterior / posterior.sum(-1, keepdim=True)) + share * prior
    moved = moved.clamp(min=SMALLEST_WEIGHT).masked_fill(prior <= 0, 0.0)
    return weights.where(is_ruled_out, moved)


def weights_of(log_likelihoods: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """The weights after texts that member k gave log-probability `log_likelihoods[..., k]`, for a share of zero.

    Both (..., K) float64, finite. The closed form of many `update`s, which can neither forget a member nor drift.
    """
    return (prior.log() + log_likelihoods).softmax(-1)


def loss_bound(prior_weight: float, num_tokens: int, share: float) -> float:
    """By how many nats the pool's loss on `num_tokens` tokens can exceed that of a member with this prior weight."""
    stay = 1 - share + share * prior_weight
    return -math.log(prior_weight) - max(num_tokens - 1, 0) * math.log(stay)
