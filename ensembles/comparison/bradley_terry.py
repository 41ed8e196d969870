"""Many models, compared two at a time: one strength for each.

    P(i beats j) = 1 / (1 + exp(θ_j - θ_i))        Σ θ = 0

At the likeliest θ, with half a win and half a loss of each model against an average one added (so that a model which
won everything is strong and not infinitely strong). A draw is half a win for either. Intervals are of whole items (or
clusters of them) drawn anew, since the outcomes of one item go together: 400 resamples, Student's tails. The added half
win and half loss count for their variance as one item (or cluster) more does: whoever won all of five items has won in
every resample, too, which does not make the strength known.

Reference: Bradley & Terry, "Rank analysis of incomplete block designs", 1952; the prior: Davidson & Solomon 1973.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, stdtrit

from ensemble_server.ensembles.comparison.bootstrap import by_cluster
from ensemble_server.ensembles.comparison.draws import without_rounding
from ensemble_server.ensembles.comparison.intervals import Interval

NUM_RESAMPLES = 400
NUM_STEPS = 60
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Strength:
    """`log_strength`: θ; `interval`: of it, None with fewer than two units. `win_rate`: chance to beat another model of
    these, drawn at random."""

    log_strength: float
    interval: Interval | None
    win_rate: float


def bradley_terry(
    outcomes: np.ndarray, *, clusters: Sequence[object] | None = None, seed: int = 0, level: float = 0.95
) -> list[Strength]:
    """outcomes: (num_models, num_models, num_items); [i, j, n] is 1 if i beat j on item n, 0 if j beat i, else 0.5.

    NaN where the two were not compared; [j, i] may be NaN if [i, j] is given. `clusters`: of the items, drawn whole.
    One strength for each model.
    """
    wins = _wins(np.asarray(outcomes, dtype=np.float64))
    num_items = wins.shape[2]
    if clusters is not None:
        num_models = len(wins)
        summed = by_cluster(wins.reshape(-1, num_items).T, clusters)
        wins = summed.T.reshape(num_models, num_models, len(summed))
    num_models, _, num_units = wins.shape
    found = _fit(wins.sum(axis=2)[None])[0]
    intervals: Sequence[Interval | None] = [None] * num_models
    if num_units >= 2:
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=NUM_RESAMPLES)
        of_units = _fit(np.einsum("ijn,bn->bij", wins, drawn.astype(np.float64))).var(axis=0, ddof=1)
        errors = np.sqrt(
            of_units * num_units / (num_units - 1)
            + _variance_of_added(found, wins.sum(axis=2)) * (num_items / num_units) ** 2
        )
        tail = float(stdtrit(num_units - 1, (1 + level) / 2))
        intervals = [
            Interval(float(at - tail * error), float(at + tail * error), level, "student")
            for at, error in zip(found, errors, strict=True)
        ]
    chances = expit(found[:, None] - found[None, :])
    others = max(num_models - 1, 1)
    return [
        Strength(float(found[row]), intervals[row], float((chances[row].sum() - chances[row, row]) / others))
        for row in range(num_models)
    ]


def outcomes_of_scores(scores: np.ndarray) -> np.ndarray:
    """Each item's scores, higher is better, as `bradley_terry` takes them. scores: (num_models, num_items).

    Scores that differ by rounding alone are a draw.
    """
    scores = np.asarray(scores, dtype=np.float64)
    difference = without_rounding(scores[:, None, :] - scores[None, :, :], scores[None, :, :])
    return np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2)


def _variance_of_added(theta: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """(M,): what the half win and half loss of each model against an average one add to the variance of θ.

    theta: (M,), wins: (M, M), of all items.
    """
    alone = expit(theta)
    inverse = np.linalg.inv(_hessian(theta[None], (wins + wins.T)[None])[0])
    spread = (inverse * (alone**2 + (1 - alone) ** 2) / 2) @ inverse  # of outcomes of 1 and of 0, half of each
    centred = np.eye(len(theta)) - 1 / len(theta)
    return np.diag(centred @ spread @ centred)


def _hessian(theta: np.ndarray, games: np.ndarray) -> np.ndarray:
    """Of minus the log-likelihood. theta: (B, M), games: (B, M, M) -> (B, M, M)"""
    chances, alone = expit(theta[:, :, None] - theta[:, None, :]), expit(theta)
    curvature = games * chances * (1 - chances)
    hessian = -curvature
    places = np.arange(theta.shape[1])
    hessian[:, places, places] += curvature.sum(axis=2) + alone * (1 - alone)
    return hessian


def _wins(outcomes: np.ndarray) -> np.ndarray:
    """[i, j, n]: wins of i over j, each pair counted once; zeros where the two were not compared."""
    turned = 1 - outcomes.transpose(1, 0, 2)
    wins = np.where(np.isnan(outcomes), turned, outcomes)
    both = ~np.isnan(outcomes) & ~np.isnan(turned)
    wins = np.where(both, (outcomes + turned) / 2, wins)
    wins[np.arange(len(wins)), np.arange(len(wins))] = 0
    return np.nan_to_num(wins)


def _fit(wins: np.ndarray) -> np.ndarray:
    """wins: (B, M, M) -> θ (B, M), by Newton's method; the log-likelihood is concave."""
    batch, num_models, _ = wins.shape
    theta = np.zeros((batch, num_models))
    games = wins + wins.transpose(0, 2, 1)
    for _ in range(NUM_STEPS):
        chances = expit(theta[:, :, None] - theta[:, None, :])
        alone = expit(theta)  # against an average model
        gradient = (wins - games * chances).sum(axis=2) + 0.5 - alone
        step = np.clip(np.linalg.solve(_hessian(theta, games), gradient[..., None])[..., 0], -2, 2)
        theta = theta + step
        if np.abs(step).max() < TOLERANCE:
            break
    return theta - theta.mean(axis=1, keepdims=True)
