"""A learned gate on top of the posterior pool: weights that also know how sure the members are at this very token.

    w_k(t) ∝ v_k(t) · exp( Σ_f θ_f x_fk(t) + Σ_c φ_ck z_ck(t) )          v: the posterior pool's weights

All x and z are known before token t is drawn: they come from the members' distributions at t, and from what members
gave the tokens before it. Nothing more is computed than from the log-probabilities that are pooled anyway.

    x, alike for all members (θ), each less its mean over them         z, for each member in its own way (φ)
    entropy          H(p_k), nats                                      bias           1
    distance         total variation of p_k and the members' mean      spread         mean distance over the members
    recent_h         Σ_{s<t} 2^(-(t-s)/h) (log p_k - max_j log p_j)    mean_entropy   mean entropy over the members
    posterior        log v_k                                           early          2^(-n/32), n tokens judged so far
    early_posterior  log v_k · early                                   entropy        H(p_k)

With θ = φ = 0 it is the posterior pool, whose own state it keeps beside its own. Differences of log-probabilities count
down to `FLOOR_NATS`: what one member rules out would drown everything else.

Related: Jordan & Jacobs, "Hierarchical mixtures of experts and the EM algorithm", 1994, whose gate sees the input; this
one sees only the members, so it is small, and does not depend on the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import GATE_CONTEXT, GATE_FEATURES
from ensemble_server.ensembles.pooling.posterior import Weights

if TYPE_CHECKING:
    import torch

    from ensemble_server.ensembles.base import Gate

HALF_LIVES = (4, 16, 64)  # tokens; those of the features recent_h
EARLY_HALF_LIFE = 32  # tokens
FLOOR_NATS = -20.0

_DECAY = np.exp2(-1 / np.array(HALF_LIVES))[:, None]  # (H, 1)


@dataclass(frozen=True)
class Trail:
    """What the gate keeps between tokens. `sums`: (H, K), the features recent_h of the next token; `num_tokens`: n."""

    sums: np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class Situation:
    """What the gate sees of T tokens. `views`: (2, K, T), entropy and distance; `posterior`: (K, T), sums to one over
    K; `recent`: (H, K, T); `places`: (T,), the tokens that were judged before each."""

    views: np.ndarray
    posterior: Weights
    recent: np.ndarray
    places: np.ndarray


def start(num_members: int) -> Trail:
    """Before the first token."""
    return Trail(np.zeros((len(HALF_LIVES), num_members)), 0)


def follow(trail: Trail, token_logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray, Trail]:
    """Along T tokens that member k gave `token_logprobs[k]` (nats, (K, T)): recent (H, K, T) and places (T,) before
    each of them, and the trail behind the last.

    A token that every member ruled out (all -inf) speaks for none, but it counts as one.
    """
    best = token_logprobs.max(axis=0)
    lags = np.maximum(token_logprobs - np.where(np.isfinite(best), best, 0.0), FLOOR_NATS)
    num_tokens = token_logprobs.shape[1]
    recent = np.empty((*trail.sums.shape, num_tokens))
    sums = trail.sums
    for t in range(num_tokens):
        recent[..., t] = sums
        sums = _DECAY * (sums + lags[:, t])
    return recent, trail.num_tokens + np.arange(num_tokens), Trail(sums, trail.num_tokens + num_tokens)


def views(logprobs: torch.Tensor) -> np.ndarray:
    """How sure members are, and how far from their mean. logprobs: (K, T, V), normalised. -> (2, K, T) float64"""
    import torch

    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    mean = probs.mean(0)
    distance = torch.stack([(own - mean).abs().sum(-1) / 2 for own in probs])  # one at a time: (T, V) is large
    return torch.stack([entropy, distance]).double().cpu().numpy()


def features(seen: Situation) -> tuple[np.ndarray, np.ndarray]:
    """x: (F, K, T), each with mean zero over K, and z: (C, K, T), neither scaled; in the order of `GATE_FEATURES` and
    `GATE_CONTEXT`."""
    entropy, distance = seen.views
    early = np.exp2(-seen.places / EARLY_HALF_LIFE)
    trust = np.log(seen.posterior)
    trust = np.maximum(trust - trust.max(axis=0), FLOOR_NATS)
    own = np.stack([entropy, distance, *seen.recent, trust, trust * early])
    context = (np.ones_like(early), distance.mean(axis=0), entropy.mean(axis=0), early)
    return (
        own - own.mean(axis=1, keepdims=True),
        np.stack([*(np.broadcast_to(row, entropy.shape) for row in context), entropy]),
    )


def weights(gate: Gate, seen: Situation) -> Weights:
    """(K, T), sums to one over K. The gate's members are in the order of the K."""
    x, z = features(seen)
    theta = np.array([gate.features[name].weight / gate.features[name].scale for name in GATE_FEATURES])
    mean, scale = np.array([(gate.context[name].mean, gate.context[name].scale) for name in GATE_CONTEXT]).T
    phi = np.array([[member.slopes[name] for name in GATE_CONTEXT] for member in gate.members.values()])  # (K, C)
    moved = np.einsum("f,fkt->kt", theta, x) + np.einsum("kc,ckt->kt", phi / scale, z - mean[:, None, None])
    return moved_by(seen.posterior, moved)


def moved_by(posterior: Weights, scores: np.ndarray) -> Weights:
    """∝ posterior · exp(scores), over the first axis. Both (K, T), posterior positive."""
    logs = np.log(posterior) + scores
    unscaled = np.exp(logs - logs.max(axis=0))
    return unscaled / unscaled.sum(axis=0)
