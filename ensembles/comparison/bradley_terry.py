"""Many models, compared two at a time: one strength for each.

    P(i beats j) = 1 / (1 + exp(θ_j - θ_i))        Σ θ = 0

At the likeliest θ, with half a win and half a loss of each model against an average one added (so that a model which
won everything is strong and not infinitely strong). A draw is half a win for either. Intervals are of whole items drawn
anew, since the outcomes of one item go together: 400 resamples, Student's tails.

Reference: Bradley & Terry, "Rank analysis of incomplete block designs", 1952; the prior: Davidson & Solomon 1973.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, stdtrit

from ensemble_server.ensembles.comparison.intervals import Interval

NUM_RESAMPLES = 400
NUM_STEPS = 60
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Strength:
    """`log_strength`: θ; `interval`: of it, None with fewer than two items. `win_rate`: chance to beat another model of
    these, drawn at random."""

    log_strength: float
    interval: Interval | None
    win_rate: float


def bradley_terry(outcomes: np.ndarray, *, seed: int = 0, level: float = 0.95) -> list[Strength]:
    """outcomes: (num_models, num_models, num_items); [i, j, n] is 1 if i beat j on item n, 0 if j beat i, else 0.5.

    NaN where the two were not compared; [j, i] may be NaN if [i, j] is given. One strength for each model.
    """
    wins = _wins(np.asarray(outcomes, dtype=np.float64))
    num_models, _, num_items = wins.shape
    found = _fit(wins.sum(axis=2)[None])[0]
    intervals: Sequence[Interval | None] = [None] * num_models
    if num_items >= 2:
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=NUM_RESAMPLES)
        errors = _fit(np.einsum("ijn,bn->bij", wins, drawn.astype(np.float64))).std(axis=0, ddof=1)
        tail = float(stdtrit(num_items - 1, (1 + level) / 2)) * (num_items / (num_items - 1)) ** 0.5
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
    """Each item's scores, higher is better, as `bradley_terry` takes them. scores: (num_models, num_items)."""
    scores = np.asarray(scores, dtype=np.float64)
    difference = scores[:, None, :] - scores[None, :, :]
    return np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2)


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
        curvature = games * chances * (1 - chances)
        hessian = -curvature
        diagonal = curvature.sum(axis=2) + alone * (1 - alone)
        hessian[:, np.arange(num_models), np.arange(num_models)] += diagonal
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -2, 2)
        theta = theta + step
        if np.abs(step).max() < TOLERANCE:
            break
    return theta - theta.mean(axis=1, keepdims=True)
