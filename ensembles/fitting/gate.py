"""The gate of a posterior pool, trained by the likelihood of the pool that it makes.

    L(θ, φ) = -1/T Σ_t log Σ_k w_k(t) p_k(x_t)  +  λ/2 (|θ|² + |φ|²)        w: `ensembles.pooling.gated`
    ∂ L / ∂ s_k(t) = (w_k(t) - r_k(t)) / T,   r_k = w_k p_k(x_t) / Σ_j w_j p_j(x_t),   s: what w adds to log v

All features are scaled to standard deviation one, so λ draws each of them alike towards the posterior pool itself
(θ = φ = 0). λ is chosen by cross-validation: for each of a grid the gate is trained on all folds but one and judged on
that, and the one is taken that is best on all of them, if it is better than no gate. Then it is trained on everything.
L is not convex in general; L-BFGS starts at the posterior pool with the strictest λ, and at the last one's end with the
next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.base import GATE_CONTEXT, GATE_FEATURES, Gate, GateContext, GateMember, GateTerm
from ensemble_server.ensembles.pooling import following, gated
from ensemble_server.ensembles.pooling.following import Share

PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
MAX_STEPS = 50
NOT_TRAINED = -1


@dataclass(frozen=True)
class GateText:
    """One window. `logprobs`: (K, T) nats that members gave the tokens; `views`: (2, K, T), see `gated.views`; `folds`:
    (T,) int, of each token, `NOT_TRAINED` for those that are only read."""

    logprobs: np.ndarray
    views: np.ndarray
    folds: np.ndarray


@dataclass(frozen=True)
class GateFit:
    """`penalty`: λ, None if no gate was better than the posterior pool itself; then `gate` is that.

    `nats`: per token in cross-validation, `posterior_nats`: of the pool without a gate. `num_tokens`: trained on.
    """

    gate: Gate
    penalty: float | None
    num_tokens: int
    nats: float
    posterior_nats: float


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
) -> GateFit:
    """prior: (K,), sums to one; identities: name and identity of each member. State starts anew in each text.

    Raises `ValueError` if there are fewer than two folds with a token to train on.
    """
    x, z, log_posterior, logprobs, folds = _tokens(texts, prior, share)
    if len(numbers := np.unique(folds[folds != NOT_TRAINED])) < 2:
        raise ValueError("a gate needs two folds of tokens to be trained on")
    is_trained = folds != NOT_TRAINED
    feature_scale = _scale(np.sqrt((x[..., is_trained] ** 2).mean(axis=(1, 2))))
    mean, scale = z[..., is_trained].mean(axis=(1, 2)), _scale(z[..., is_trained].std(axis=(1, 2)))
    mean[0], scale[0] = 0.0, 1.0  # the bias
    design = Design(
        x / feature_scale[:, None, None], (z - mean[:, None, None]) / scale[:, None, None], log_posterior, logprobs
    )
    parameters = np.zeros(len(x) + z.shape[0] * z.shape[1])
    posterior_nats, judged = 0.0, np.zeros(len(penalties))
    for number in numbers:
        judge = design.chosen(folds == number)
        trained = design.chosen(is_trained & (folds != number))
        part = np.mean(folds[is_trained] == number)
        posterior_nats += part * judge.loss(parameters, 0.0)[0]  # summed alike: what is equal is no rounding better
        judged += [part * judge.loss(found, 0.0)[0] for found in _trained(trained, penalties)]
    nats, penalty = posterior_nats, None
    if judged.min() < posterior_nats:
        best = int(judged.argmin())
        nats, penalty = float(judged[best]), penalties[best]
        *_, parameters = _trained(design.chosen(is_trained), penalties[: best + 1])
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
    return GateFit(gate, penalty, int(is_trained.sum()), nats, posterior_nats)


def _trained(design: Design, penalties: Sequence[float]) -> Iterator[np.ndarray]:
    """The parameters for each penalty, from the strictest on."""
    from scipy.optimize import minimize

    found = np.zeros(len(design.x) + design.z.shape[0] * design.z.shape[1])
    for penalty in penalties:
        options = {"maxiter": MAX_STEPS}
        found = minimize(design.loss, found, args=(penalty,), jac=True, method="L-BFGS-B", options=options).x
        yield found


def gated_logprobs(gate: Gate, logprobs: np.ndarray, views: np.ndarray, prior: np.ndarray, share: Share) -> np.ndarray:
    """What the gated pool gave the tokens of one text, (T,) nats; see `GateText` for what it is made of."""
    weights = gated.weights(gate, _situation(logprobs, views, prior, share))
    return np.logaddexp.reduce(np.log(weights) + logprobs, axis=0)


def _situation(logprobs: np.ndarray, views: np.ndarray, prior: np.ndarray, share: Share) -> gated.Situation:
    path, _ = following.track(following.start(prior, share), logprobs, prior, share)
    recent, places, _ = gated.follow(gated.start(len(prior)), logprobs)
    return gated.Situation(views, path[:, :-1], recent, places)


def _tokens(texts: Sequence[GateText], prior: np.ndarray, share: Share) -> tuple[np.ndarray, ...]:
    """x, z, log posterior, log-probabilities and folds of all texts in a row. Of tokens that no member thought possible
    nothing can be learnt."""
    parts = []
    for text in texts:
        seen = _situation(text.logprobs, text.views, prior, share)
        is_possible = np.isfinite(text.logprobs.max(axis=0))
        x, z = gated.features(seen)
        folds = np.where(is_possible, text.folds, NOT_TRAINED)
        parts.append((x, z, np.log(seen.posterior), text.logprobs, folds))
    return tuple(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))


def _scale(spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 1e-9, spread, 1.0)
