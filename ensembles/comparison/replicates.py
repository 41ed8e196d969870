"""The same measure with members that were trained with other seeds: is a difference one of methods, or of one training?

Replicates and documents are crossed: every replicate is measured on the same documents. So the mean difference D over R
replicates varies for two reasons, which add up:

    var D = s_R² / R + s_D²      s_R: of the replicates' differences; s_D: of D over documents, replicates as they are

What documents do in one replicate alone is in both (as in Owen's "pigeonhole" bootstrap, 2007,
https://doi.org/10.1214/07-AOAS122), which makes the interval a little too wide where that is most of it. Its tails are
Student's, with the degrees of freedom of Welch and Satterthwaite: three seeds are three numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from ensemble_server.ensembles.comparison.bootstrap import by_cluster
from ensemble_server.ensembles.comparison.dependence import of_neighbours
from ensemble_server.ensembles.comparison.intervals import Estimate, Interval
from ensemble_server.ensembles.comparison.significance import Spread, combined


def crossed_ratio_difference(
    numerators: np.ndarray,
    denominators: np.ndarray,
    baseline_numerators: np.ndarray,
    baseline_denominators: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    are_neighbours: bool = False,
    level: float = 0.95,
) -> Estimate:
    """Mean over replicates of the difference of two ratios of sums. All (num_replicates, num_documents).

    `clusters`: of the documents; `are_neighbours`: they are cut out of one text, in order. No interval with a single
    replicate or document.
    """
    parts = [
        np.asarray(part, dtype=np.float64)
        for part in (numerators, denominators, baseline_numerators, baseline_denominators)
    ]
    num_replicates, num_documents = parts[0].shape
    ours, size, theirs, their_size = parts
    ratio, their_ratio = ours.sum(axis=1) / size.sum(axis=1), theirs.sum(axis=1) / their_size.sum(axis=1)
    differences = ratio - their_ratio  # (R,)
    value = float(differences.mean())
    if num_replicates < 2 or num_documents < 2:
        return Estimate(value, None, None, num_replicates)
    # What each document adds to the error of the mean difference: (R, n) -> (n,), of sum zero.
    influence = (
        (ours - ratio[:, None] * size) / size.sum(axis=1, keepdims=True)
        - (theirs - their_ratio[:, None] * their_size) / their_size.sum(axis=1, keepdims=True)
    ).mean(axis=0)
    influence = by_cluster(influence[:, None], clusters)[:, 0]
    num_units = len(influence)
    freedom, factor = num_units - 1.0, 1.0
    if are_neighbours:
        dependence = of_neighbours(influence)
        freedom, factor = dependence.freedom, dependence.error_factor
    of_documents = Spread(factor * float(np.sqrt(num_units / (num_units - 1) * influence @ influence)), freedom)
    of_replicates = Spread(float(differences.std(ddof=1)) / num_replicates**0.5, num_replicates - 1.0)
    spread = combined([of_documents, of_replicates])
    half = spread.standard_error * float(stdtrit(spread.freedom, (1 + level) / 2))
    return Estimate(
        value, Interval(value - half, value + half, level, "student"), spread.standard_error, num_replicates
    )
