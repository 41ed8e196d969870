"""The posterior pool with a share that nobody has to choose: a Bayesian mixture over a grid of shares.

    p(x) = Σ_g W_g Σ_k V_gk p_k(x)                    V_g: the posterior pool's weights with the g-th share of the grid
    W_g(t+1) = (1 - β) W_g(t) p_g(x_t) / Σ_h W_h(t) p_h(x_t)  +  β / G          p_g = Σ_k V_gk p_k

So what is pooled is one weight per member, Σ_g W_g V_gk, and what is kept between tokens is G × (1 + K) numbers. For
any text of T tokens its loss is at most that of the best share of the grid plus ln G + (T - 1) · ln 1/(1 - β + β/G)
nats: ln 6 = 1.8 and 0.0001 a token more.

Reference: "Learn-α", Monteleoni & Jaakkola, "Online learning of non-stationary sequences", 2003; Vovk, "Derandomizing
stochastic prediction strategies", 1999.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ensemble_server.ensembles.pooling.posterior import SMALLEST_WEIGHT, Weights

GRID = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
SHARE_OF_SHARES = 1e-4  # β: so that a share which was bad for a long text can come back

State = np.ndarray
"""(G, 1 + K) float64: W_g, and V_gk. Each V_g sums to one, and so do the W_g."""

_SHARES = np.array(GRID)[:, None]


def start(prior: Weights) -> State:
    """Before the first token: all shares alike, each with the prior. prior: (K,), sums to one."""
    return np.column_stack([np.full(len(GRID), 1 / len(GRID)), np.tile(prior, (len(GRID), 1))])


def member_weights(state: State) -> Weights:
    """What the members count for the next token: (K,), or (..., K) of several states (..., G, 1 + K)."""
    return (state[..., :1] * state[..., 1:]).sum(axis=-2)


def update(state: State, token_logprobs: Sequence[float] | np.ndarray, prior: Weights) -> State:
    """The state after one token that member k gave log-probability `token_logprobs[k]` (nats).

    If every member ruled the token out (all -inf) the state stays: the token says nothing.
    """
    logprobs = np.asarray(token_logprobs, dtype=np.float64)
    best = logprobs[prior > 0].max(initial=-math.inf)
    if best == -math.inf:
        return state
    gains = state[:, 1:] * np.exp(logprobs - best)
    likelihoods = np.maximum(gains.sum(axis=1), SMALLEST_WEIGHT)
    posterior = state[:, 0] * likelihoods
    moved = np.empty_like(state)
    moved[:, 0] = (1 - SHARE_OF_SHARES) * (posterior / posterior.sum()) + SHARE_OF_SHARES / len(GRID)
    follows = (1 - _SHARES) * (gains / likelihoods[:, None]) + _SHARES * prior
    moved[:, 1:] = np.where(prior > 0, np.maximum(follows, SMALLEST_WEIGHT), 0.0)
    return moved


def loss_bound(num_tokens: int) -> float:
    """By how many nats the loss on `num_tokens` tokens can exceed that of the best share of the grid."""
    num = len(GRID)
    return math.log(num) - max(num_tokens - 1, 0) * math.log(1 - SHARE_OF_SHARES + SHARE_OF_SHARES / num)
