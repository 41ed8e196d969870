"""From what the members said to what the student is taught: a weight for every member at every token.

    P(x) = Σ_k w_k(t) P_k(x)

    mixture   the weights that the ensemble's own pool has at token t
    min_ce    1 for the member whose cross entropy is least (the first of equal ones), 0 for the others
    avg_ce    softmax over members of r_k = exp(-CE_k)

CE_k is member k's mean cross entropy in nats per token, over the token itself, its window or its document. The last two
are FuseLLM's (Wan et al., ICLR 2024, https://arxiv.org/abs/2401.10491): over packed sequences, of each member its 10
likeliest tokens, renormalised (`top_k` 10, no tail). Pure functions of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import effective_weights, following
from ensemble_server.server.config.distillation import Level
from ensemble_server.server.distill.records import WindowRecord

Weights = np.ndarray  # (R, T) float64, sums to one over R


@dataclass(frozen=True)
class FusedTarget:
    """`ids`: (T, M) int64; `probs`: (T, M) float32, `tail`: (T,) float32, of all tokens that are not among the ids.

    Together they sum to one at each of the T tokens. Places that a position does not fill have probability 0.
    """

    ids: np.ndarray
    probs: np.ndarray
    tail: np.ndarray


def fused(record: WindowRecord, weights: Weights, *, only_top: int | None = None) -> FusedTarget:
    """`only_top`: cut every member off after so many of its likeliest tokens and renormalise; there is no tail then."""
    ids, logprobs = record.dense()
    probs = np.exp(logprobs.astype(np.float64))
    tail = np.exp(record.tail.astype(np.float64))
    if only_top is not None:
        order = np.argsort(-probs, axis=-1, kind="stable")[..., :only_top]
        kept = np.zeros_like(probs)
        np.put_along_axis(kept, order, np.take_along_axis(probs, order, axis=-1), axis=-1)
        probs, tail = kept, np.zeros_like(tail)
    total = probs.sum(axis=-1) + tail  # 1 but for float16
    scaled = weights / total
    return FusedTarget(
        ids,
        np.einsum("rt,rtm->tm", scaled, probs).astype(np.float32),
        (scaled * tail).sum(axis=0).astype(np.float32),
    )


def pool_weights(mixture: Mixture, of_tokens: np.ndarray) -> Weights:
    """The weights of the pool at each token of a window. of_tokens: (R, T) nats of the tokens that came.

    A geometric pool is no average of its members: it has a row of its own, the last.
    """
    if mixture.pool == "geometric":
        weights = np.zeros(of_tokens.shape)
        weights[-1] = 1.0
        return weights
    prior = effective_weights(list(mixture.weights.values()))
    if mixture.pool == "posterior" and len(prior) > 1:
        start = following.start(prior, mixture.share)
        return following.track(start, of_tokens.astype(np.float64), prior, mixture.share)[0][:, :-1]
    return np.repeat(prior[:, None], of_tokens.shape[1], axis=1)


def cross_entropies(of_tokens: Sequence[np.ndarray], documents: Sequence[np.ndarray], level: Level) -> list[np.ndarray]:
    """(R, T) per window: each row's mean nats per token over the unit to which token t belongs.

    `documents`: (s,) per window, of its last s <= T tokens, those that are scored there. Tokens before these have no
    document; what they cost counts nowhere, and their own figure is that of the first scored one.
    """
    if level == "token":
        return [-nats.astype(np.float64) for nats in of_tokens]
    if level == "window":
        units = [np.full(len(owners), number) for number, owners in enumerate(documents)]
    else:
        units = list(documents)
    num_units = 1 + max(int(owners.max()) for owners in units)
    flat = np.concatenate(units)
    nats = np.concatenate([-part[:, part.shape[1] - len(own) :] for part, own in zip(of_tokens, units, strict=True)], 1)
    sizes = np.maximum(np.bincount(flat, minlength=num_units), 1)
    means = np.stack([np.bincount(flat, row, num_units) / sizes for row in nats.astype(np.float64)])
    return [
        means[:, np.concatenate([np.full(part.shape[1] - len(own), own[0]), own])]
        for part, own in zip(of_tokens, units, strict=True)
    ]


def min_ce_weights(entropies: np.ndarray) -> Weights:
    """entropies: (K, T) nats."""
    weights = np.zeros(entropies.shape)
    weights[entropies.argmin(axis=0), np.arange(entropies.shape[1])] = 1.0
    return weights


def avg_ce_weights(entropies: np.ndarray) -> Weights:
    """entropies: (K, T) nats."""
    rewards = np.exp(np.exp(-entropies))  # r lies in (0, 1], so its exponential in (1, e]
    return rewards / rewards.sum(axis=0)
