"""Weights of the geometric pool that make a text most likely, by convex optimisation.

    nats(w) = 1/T Σ_t [ log Σ_y exp Σ_k w_k l_k(y) - Σ_k w_k l_k(x_t) ],     l_k(y) = log p_k(y | earlier tokens)
    ∂ nats / ∂ w_k = 1/T Σ_t [ E_{y ~ pool} l_k(y) - l_k(x_t) ]

A log-partition function less a linear one: convex in w, so that whatever minimum is found is the lowest. Two kinds:

- `simplex`: none negative, sum one: what the pool makes of weights that are all positive. By SLSQP (Kraft 1988).
- `free`: any numbers, which the pool takes as written as soon as one is negative. By L-BFGS. If none of the
  result is negative the pool would scale them to sum to one; then `simplex` is the fit to use.

Whole distributions are needed, K x V numbers per token, so they come in chunks and are looked at again for every step
of the optimisation: keep a sample of positions, or compute them anew each time. What one member rules out (-inf) counts
as `FLOOR_NATS`, as it does in the pool for negative weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ensemble_server.ensembles.pooling.geometric import FLOOR_NATS

if TYPE_CHECKING:
    from torch import Tensor

Constraint = Literal["simplex", "free"]
Chunks = Callable[[], Iterable["tuple[Tensor, Tensor]"]]
"""Each call goes over the text once: (logprobs (K, t, V) float, normalised over V; targets (t,) int64) at a time."""

MAX_STEPS = 200


@dataclass(frozen=True)
class GeometricFit:
    """`weights`: (K,). `nats_per_token`: -log-likelihood there; `single_nats_per_token`: (K,), of each member alone.

    `num_passes`: how often the chunks were gone over.
    """

    weights: np.ndarray
    nats_per_token: float
    single_nats_per_token: np.ndarray
    num_tokens: int
    num_passes: int


def fit_geometric(chunks: Chunks, *, constraint: Constraint = "simplex", max_steps: int = MAX_STEPS) -> GeometricFit:
    """Ends no worse than the best single member. Raises `ValueError` without a token.

    Memory besides a chunk: three times (t, V). Sums over tokens are float64.
    """
    from scipy.optimize import minimize

    num_passes = 0

    def nats(weights: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal num_passes
        num_passes += 1
        total, gradient, num_tokens = 0.0, np.zeros(len(weights)), 0
        for logprobs, targets in chunks():
            of_chunk, of_gradient = nats_and_gradient(logprobs, targets, weights)
            total, gradient, num_tokens = total + of_chunk, gradient + of_gradient, num_tokens + len(targets)
        return total / num_tokens, gradient / num_tokens

    singles, num_tokens = _single_nats(chunks)
    num_members = len(singles)
    start = np.full(num_members, 1 / num_members)
    if num_members == 1 and constraint == "simplex":
        return GeometricFit(start, float(singles[0]), singles, num_tokens, 1)
    if constraint == "simplex":
        found = minimize(
            nats,
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * num_members,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"maxiter": max_steps, "ftol": 1e-9},
        )
        weights = np.clip(found.x, 0, None)
        weights /= weights.sum()
    else:
        found = minimize(nats, start, jac=True, method="L-BFGS-B", options={"maxiter": max_steps, "ftol": 1e-10})
        weights = found.x
    value = nats(weights)[0]
    single = int(np.argmin(singles))
    if singles[single] < value:  # only by what the optimiser left undone
        weights, value = np.eye(num_members)[single], float(singles[single])
    return GeometricFit(weights, value, singles, num_tokens, num_passes + 1)


@torch.inference_mode()
def nats_and_gradient(logprobs: Tensor, targets: Tensor, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Summed over the tokens of a chunk: -log p(target) under the pool with `weights` as written, and its gradient.

    logprobs: (K, t, V); targets: (t,) int64; weights: (K,). -> (nats, (K,))
    """
    pooled = torch.zeros_like(logprobs[0])
    for member, weight in zip(logprobs, weights.tolist(), strict=True):
        pooled.add_(member.clamp(min=FLOOR_NATS), alpha=weight)
    partition = pooled.logsumexp(-1, keepdim=True)
    nats = (partition[:, 0] - pooled.gather(1, targets[:, None])[:, 0]).double().sum()
    probs = pooled.sub_(partition).exp_()
    gradient = [
        float(((probs * floored).sum(-1) - floored.gather(1, targets[:, None])[:, 0]).double().sum())
        for floored in (member.clamp(min=FLOOR_NATS) for member in logprobs)
    ]
    return float(nats), np.array(gradient)


def _single_nats(chunks: Chunks) -> tuple[np.ndarray, int]:
    """Mean nats per token of each member alone, (K,), and the number of tokens."""
    totals, num_tokens = None, 0
    for logprobs, targets in chunks():
        index = targets[None, :, None].expand(len(logprobs), -1, 1)
        of_chunk = -logprobs.gather(2, index)[..., 0].clamp(min=FLOOR_NATS).double().sum(1).cpu().numpy()
        totals = of_chunk if totals is None else totals + of_chunk
        num_tokens += len(targets)
    if totals is None or not num_tokens:
        raise ValueError("there is no token to fit weights to")
    return totals / num_tokens, num_tokens
