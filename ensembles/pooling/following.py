"""Weights that follow a text: the posterior pool with a share that is given, or with `auto`, one that is learnt.

What is kept between tokens (the *state*) is one weight per member with a given share, and what `learned_share` keeps
with `auto`. Whoever pools asks for the members' weights and need not know which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ensemble_server.ensembles.pooling import learned_share, posterior
from ensemble_server.ensembles.pooling.posterior import Weights

Share = float | Literal["auto"]
State = np.ndarray


def start(prior: Weights, share: Share) -> State:
    """Before the first token. prior: (K,), sums to one."""
    return learned_share.start(prior) if share == "auto" else prior


def member_weights(state: State, share: Share) -> Weights:
    """(K,), which sum to one; of several states (..., K)."""
    return learned_share.member_weights(state) if share == "auto" else state


def update(state: State, token_logprobs: Sequence[float] | np.ndarray, prior: Weights, share: Share) -> State:
    """The state after one token that member k gave log-probability `token_logprobs[k]` (nats)."""
    if share == "auto":
        return learned_share.update(state, token_logprobs, prior)
    return posterior.update(state, token_logprobs, prior, share)


def track(state: State, token_logprobs: np.ndarray, prior: Weights, share: Share) -> tuple[Weights, State]:
    """Members' weights before each of T tokens and after the last, (K, T + 1), and the state then.

    token_logprobs: (K, T) nats.
    """
    if share != "auto":
        path = posterior.track(state, token_logprobs, prior, share)
        return path, path[:, -1]
    path = np.empty((len(prior), token_logprobs.shape[1] + 1))
    path[:, 0] = learned_share.member_weights(state)
    for t in range(token_logprobs.shape[1]):
        state = learned_share.update(state, token_logprobs[:, t], prior)
        path[:, t + 1] = learned_share.member_weights(state)
    return path, state
