"""The gate of a posterior pool, trained by the likelihood of the pool that it makes.

    L(θ, φ) = -1/T Σ_t log Σ_k w_k(t) p_k(x_t)  +  λ/2 (|θ|² + |φ|²)        w: `ensembles.pooling.gated`
    ∂ L / ∂ s_k(t) = (w_k(t) - r_k(t)) / T,   r_k = w_k p_k(x_t) / Σ_j w_j p_j(x_t),   s: what w adds to log v

All features are scaled to standard deviation one, so λ draws each of them alike towards the posterior pool itself
(θ = φ = 0). Of the training texts some are kept aside: L-BFGS is run for each λ of a grid, and of all steps that it
takes the one counts that these texts like best, the posterior pool among them. L is not convex in general.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.base import GATE_CONTEXT, GATE_FEATURES, Gate, GateContext, GateMember, GateTerm
from ensemble_server.ensembles.pooling import following, gated
from ensemble_server.ensembles.pooling.following import Share

PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
MAX_STEPS = 60


@dataclass(frozen=True)
class GateText:
    """One window. `logprobs`: (K, T) nats that members gave the tokens; `views`: (2, K, T), see `gated.views`;
    `is_trained`, `is_kept_aside`: (T,) bool, what each token is for. Tokens that are neither are read all the same."""

    logprobs: np.ndarray
    views: np.ndarray
    is_trained: np.ndarray
    is_kept_aside: np.ndarray


@dataclass(frozen=True)
class GateFit:
    """`nats_aside`: per token that was kept aside, of the gate; `posterior_nats_aside`: of the pool without it.

    `penalty`: λ; `num_steps` of L-BFGS, 0 if the posterior pool itself was best. `num_tokens`: trained on.
    """

    gate: Gate
    penalty: float
    num_steps: int
    num_tokens: int
    num_aside: int
    nats_aside: float
    posterior_nats_aside: float


@dataclass(frozen=True)
class Design:
    """Tokens as the gate sees them: x (F, K, T), z (C, K, T), scaled; `prior`: log of the posterior pool's weights;
    `logprobs`: of what came; both (K, T)."""

    x: np.ndarray
    z: np.ndarray
    prior: np.ndarray
    logprobs: np.ndarray

    def chosen(self, mask: np.ndarray) -> Design:
        return Design(self.x[..., mask], self.z[..., mask], self.prior[:, mask], self.logprobs[:, mask])

    def loss(self, parameters: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        """L and its gradient. parameters: (F + C K,), θ and then φ (C, K)."""
        num_shared, num_tokens = len(self.x), self.x.shape[-1]
        phi = parameters[num_shared:].reshape(len(self.z), -1)
        scores = np.einsum("f,fkt->kt", parameters[:num_shared], self.x) + np.einsum("ck,ckt->kt", phi, self.z)
        logs = self.prior + scores
        logs = logs - np.logaddexp.reduce(logs, axis=0)
        joint = logs + self.logprobs
        pooled = np.logaddexp.reduce(joint, axis=0)
        residual = (np.exp(logs) - np.exp(joint - pooled)) / num_tokens
        gradient = np.concatenate(
            [np.einsum("kt,fkt->f", residual, self.x), np.einsum("kt,ckt->ck", residual, self.z).ravel()]
        )
        loss = -float(pooled.mean()) + penalty / 2 * float(parameters @ parameters)
        return loss, gradient + penalty * parameters


def fit_gate(
    texts: Sequence[GateText],
    prior: np.ndarray,
    share: Share,
    identities: Sequence[tuple[str, str]],
    *,
    penalties: Sequence[float] = PENALTIES,
    max_steps: int = MAX_STEPS,
) -> GateFit:
    """prior: (K,), sums to one; identities: name and identity of each member. State starts anew in each text.

    Raises `ValueError` if there is nothing to train on, or nothing kept aside.
    """
    from scipy.optimize import minimize

    x, z, log_posterior, logprobs, is_trained, is_aside = _tokens(texts, prior, share)
    if not is_trained.any() or not is_aside.any():
        raise ValueError("a gate needs tokens to be trained on, and others that are kept aside")
    feature_scale = _scale(np.sqrt((x[..., is_trained] ** 2).mean(axis=(1, 2))))
    mean, scale = z[..., is_trained].mean(axis=(1, 2)), _scale(z[..., is_trained].std(axis=(1, 2)))
    mean[0], scale[0] = 0.0, 1.0  # the bias
    design = Design(
        x / feature_scale[:, None, None], (z - mean[:, None, None]) / scale[:, None, None], log_posterior, logprobs
    )
    training, aside = design.chosen(is_trained), design.chosen(is_aside)
    nothing = np.zeros(len(x) + z.shape[0] * z.shape[1])
    posterior_nats = aside.loss(nothing, 0.0)[0]
    best: tuple[float, float, int, np.ndarray] = (posterior_nats, penalties[0], 0, nothing)
    found = nothing
    for penalty in penalties:  # from the strictest on, each from where the one before ended
        steps: list[np.ndarray] = []
        found = minimize(
            training.loss,
            found,
            args=(penalty,),
            jac=True,
            method="L-BFGS-B",
            callback=lambda step, into=steps: into.append(step.copy()),
            options={"maxiter": max_steps},
        ).x
        for number, step in enumerate(steps, start=1):
            nats = aside.loss(step, 0.0)[0]
            if nats < best[0]:
                best = (nats, penalty, number, step)
    nats, penalty, num_steps, parameters = best
    phi = parameters[len(x) :].reshape(len(z), -1)
    gate = Gate(
        share=share,
        features={
            name: GateTerm(scale=float(size), weight=float(weight))
            for name, size, weight in zip(GATE_FEATURES, feature_scale, parameters[: len(x)], strict=True)
        },
        context={
            name: GateContext(mean=float(middle), scale=float(size))
            for name, middle, size in zip(GATE_CONTEXT, mean, scale, strict=True)
        },
        members={
            name: GateMember(
                identity=identity,
                prior=float(prior[k]),
                slopes=dict(zip(GATE_CONTEXT, phi[:, k].tolist(), strict=True)),
            )
            for k, (name, identity) in enumerate(identities)
        },
    )
    return GateFit(gate, penalty, num_steps, int(is_trained.sum()), int(is_aside.sum()), nats, posterior_nats)


def gated_logprobs(gate: Gate, logprobs: np.ndarray, views: np.ndarray, prior: np.ndarray, share: Share) -> np.ndarray:
    """What the gated pool gave the tokens of one text, (T,) nats; see `GateText` for what it is made of."""
    weights = gated.weights(gate, _situation(logprobs, views, prior, share))
    return np.logaddexp.reduce(np.log(weights) + logprobs, axis=0)


def _situation(logprobs: np.ndarray, views: np.ndarray, prior: np.ndarray, share: Share) -> gated.Situation:
    path, _ = following.track(following.start(prior, share), logprobs, prior, share)
    recent, places, _ = gated.follow(gated.start(len(prior)), logprobs)
    return gated.Situation(views, path[:, :-1], recent, places)


def _tokens(texts: Sequence[GateText], prior: np.ndarray, share: Share) -> tuple[np.ndarray, ...]:
    """x, z, log posterior, log-probabilities, what is trained on and what is kept aside, of all texts in a row; without
    tokens that no member thought possible."""
    parts = []
    for text in texts:
        seen = _situation(text.logprobs, text.views, prior, share)
        is_possible = np.isfinite(text.logprobs.max(axis=0))
        x, z = gated.features(seen)
        parts.append(
            (
                x,
                z,
                np.log(seen.posterior),
                text.logprobs,
                text.is_trained & is_possible,
                text.is_kept_aside & is_possible,
            )
        )
    return tuple(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))


def _scale(spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 1e-9, spread, 1.0)
