"""The best of several against the best of others, chosen on the items that are measured: intervals that pay for it.

Whoever picks the best of k ensembles and the best of m merges by their figures, and then compares these two on the same
items, finds a gain where there is none. So all k · m differences are given intervals that hold *together*: whichever
pair is picked, for whatever reason, its interval holds.

The level that each pair's own interval needs for that is found from the largest of the standardised differences,

    max over pairs |T|        T ~ multivariate t, with the correlations of the pairs' differences

drawn with Gaussian multipliers of the items' influences (Chernozhukov, Chetverikov & Kato 2013,
https://doi.org/10.1214/13-AOS1161; the t tails: Hothorn, Bretz & Westfall 2008). Arms that answer alike cost little,
where Bonferroni's correction would charge for each; it is never stricter than Bonferroni's.
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtr

NUM_DRAWS = 20_000


def simultaneous_level(
    influences: np.ndarray, *, level: float, freedom: float, seed: int = 0, num_draws: int = NUM_DRAWS
) -> float:
    """At which level each pair's interval has to be taken, so that all of them hold together at `level`.

    influences: (num_pairs, num_units), what each item (or cluster of items) adds to the error of each pair's
    difference. `freedom`: degrees of freedom of the tails. Pairs that do not differ on any item say nothing of how
    large the largest is; where there is none but such, Bonferroni's level.
    """
    influences = np.asarray(influences, dtype=np.float64)
    num_pairs = len(influences)
    bonferroni = 1 - (1 - level) / max(num_pairs, 1)
    norms = np.sqrt((influences**2).sum(axis=1))
    differing = influences[norms > 1e-12 * max(float(norms.max(initial=0.0)), 1e-300)]
    if num_pairs < 2:
        return level
    if not len(differing):
        return bonferroni
    scaled = differing / np.sqrt((differing**2).sum(axis=1, keepdims=True))
    # The correlations have the rank of the arms, not of the pairs: few columns to draw.
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    is_real = values > 1e-10 * values.max()
    spread = vectors[:, is_real] * np.sqrt(values[is_real])  # (pairs, rank)
    rng = np.random.default_rng(seed)
    largest = np.abs(rng.standard_normal((num_draws, spread.shape[1])) @ spread.T).max(axis=1)
    largest /= np.sqrt(rng.chisquare(freedom, num_draws) / freedom)
    critical = float(np.quantile(largest, level))
    return float(np.clip(1 - 2 * stdtr(freedom, -critical), level, bonferroni))
