"""Weights of the arithmetic pool that make a text most likely, by expectation-maximisation.

    w_k  ←  1/T Σ_t  w_k p_k(x_t) / Σ_j w_j p_j(x_t)

The log-likelihood is concave in the weights, so there is one best value, and no step ever loses any (Dempster, Laird &
Rubin 1977). How far it can still rise is known: with g_k = 1/T Σ_t p_k(x_t) / Σ_j w_j p_j(x_t), a token's mean
log-likelihood is within max_k g_k - 1 nats of the best (by concavity, as Σ w_k g_k = 1). That is when to stop.

Only what each member gave the tokens that came is needed, (K, T) numbers; no distribution is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE_NATS = 1e-6  # per token
MAX_STEPS = 20_000


@dataclass(frozen=True)
class ArithmeticFit:
    """`weights`: (K,), not negative, sum one. `nats_per_token`: -log-likelihood at each step, never rising.

    `gap_nats`: by how much a token's mean log-likelihood could still rise, at most. `num_tokens`: how many were used.
    """

    weights: np.ndarray
    nats_per_token: tuple[float, ...]
    gap_nats: float
    num_tokens: int


def fit_arithmetic(
    target_logprobs: np.ndarray,
    *,
    start: Sequence[float] | None = None,
    tolerance_nats: float = TOLERANCE_NATS,
    max_steps: int = MAX_STEPS,
) -> ArithmeticFit:
    """target_logprobs: (K, T), nats that member k gave token t. Ends no worse than the best single member.

    `start`: weights to begin with, all positive (a weight of zero would stay zero); default: equal ones. Tokens that
    every member ruled out (-inf) say nothing about the weights and are left out. Raises `ValueError` without a member
    or without a token that counts.
    """
    logprobs = np.asarray(target_logprobs, dtype=np.float64)
    if logprobs.ndim != 2 or not len(logprobs):
        raise ValueError(f"log-probabilities must be (members, tokens), got the shape {logprobs.shape}")
    if np.isnan(logprobs).any():
        raise ValueError("a log-probability is not a number (NaN)")
    best = logprobs.max(axis=0, initial=-np.inf)
    logprobs, best = logprobs[:, np.isfinite(best)], best[np.isfinite(best)]
    if not len(best):
        raise ValueError("there is no token to fit weights to")
    likelihood = np.exp(logprobs - best)  # relative to the best member of each token: from 0 to 1
    offset = -best.mean()

    weights = np.full(len(logprobs), 1 / len(logprobs)) if start is None else np.asarray(start, dtype=np.float64)
    if weights.shape != (len(logprobs),) or not (weights > 0).all():
        raise ValueError(f"start must be {len(logprobs)} positive weights, got {start}")
    weights = weights / weights.sum()
    path: list[float] = []
    for _ in range(max_steps):
        mixed = weights @ likelihood
        path.append(offset - float(np.log(mixed).mean()))
        gain = (likelihood / mixed).mean(axis=1)  # g_k
        gap = max(0.0, float(gain.max()) - 1)
        if gap <= tolerance_nats:
            break
        weights = weights * gain
        weights /= weights.sum()
    else:
        path.append(offset - float(np.log(weights @ likelihood).mean()))

    # What steps are left to gain can be more than what one member is ahead: then it is the better end.
    single = int(np.argmax(logprobs.mean(axis=1)))
    alone = -float(logprobs[single].mean())
    if alone < path[-1]:
        weights = np.eye(len(logprobs))[single]
        path.append(alone)
        with np.errstate(divide="ignore"):
            gap = max(0.0, float((likelihood / likelihood[single]).mean(axis=1).max()) - 1)
    return ArithmeticFit(weights, tuple(path), gap, logprobs.shape[1])
