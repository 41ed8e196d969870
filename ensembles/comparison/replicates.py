"""The same measure with members that were trained with other seeds: is a difference one of methods, or of one training?

Replicates and documents are both drawn with replacement, each on its own (the documents are the same in every
replicate, so they are crossed with it, not nested in it): the "pigeonhole" bootstrap of Owen 2007,
https://doi.org/10.1214/07-AOAS122. It is a little too wide rather than too narrow.
"""

from __future__ import annotations

import numpy as np

from ensemble_server.ensembles.comparison.bootstrap import NUM_RESAMPLES
from ensemble_server.ensembles.comparison.intervals import Estimate, Interval


def crossed_ratio_difference(
    numerators: np.ndarray,
    denominators: np.ndarray,
    baseline_numerators: np.ndarray,
    baseline_denominators: np.ndarray,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean over replicates of the difference of two ratios of sums. All (num_replicates, num_documents).

    The interval is the percentile one; None with a single replicate or document.
    """
    parts = [
        np.asarray(part, dtype=np.float64)
        for part in (numerators, denominators, baseline_numerators, baseline_denominators)
    ]
    num_replicates, num_documents = parts[0].shape
    value = float(_mean_difference(*(part.sum(axis=1) for part in parts)))
    if num_replicates < 2 or num_documents < 2:
        return Estimate(value, None, None, num_replicates)
    rng = np.random.default_rng(seed)
    # How often each is drawn says all, and turns a resample into two products.
    of_documents = rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=num_resamples)
    of_replicates = rng.multinomial(num_replicates, np.full(num_replicates, 1 / num_replicates), size=num_resamples)
    sums = [of_documents @ part.T for part in parts]  # (num_resamples, num_replicates)
    differences = sums[0] / sums[1] - sums[2] / sums[3]
    resampled = (differences * of_replicates).sum(axis=1) / num_replicates
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    interval = Interval(float(low), float(high), level, "percentile")
    return Estimate(value, interval, float(resampled.std(ddof=1)), num_replicates)


def _mean_difference(
    numerators: np.ndarray, denominators: np.ndarray, baseline_numerators: np.ndarray, baseline_denominators: np.ndarray
) -> np.floating:
    return (numerators / denominators - baseline_numerators / baseline_denominators).mean()
