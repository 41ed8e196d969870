"""Bootstrap intervals of figures that are functions of column sums: means, ratios of sums, means over domains.

Items are drawn with replacement, all columns of an item together, so that a difference between two models is paired.
Where items come in clusters (documents of one author, questions on one passage) whole clusters are drawn. Where there
are several domains each is resampled within itself, so that the domains' sizes stay as they are.

The interval is BCa (bias-corrected and accelerated: Efron 1987; the acceleration of several domains after Davison &
Hinkley 1997, section 5.4) where it can be had, else the percentile interval. It cannot be had with fewer than
MIN_UNITS_FOR_BCA units, or if all resamples lie on one side of the figure or the items do not differ.

A resample varies less than a sample does, by (n - 1) / n, and tails of few items are those of Student's t: without a
correction intervals of 20 items at 95% hold the truth in about 90% of cases. So the tails are those of a level that is
higher by as much (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789, "expanded" intervals); with n = 200
that is 95.2% in place of 95%.

Same data and seed give the same numbers, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from ensemble_server.ensembles.comparison.intervals import Estimate, Interval, IntervalMethod

NUM_RESAMPLES = 10_000
MIN_UNITS_FOR_BCA = 10
CHUNK_CELLS = 4_000_000  # drawn indices in memory at once: 32 MB

Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Column sums per domain, each (..., num_columns), -> figures (...)."""


def bootstrap(
    domains: Sequence[np.ndarray],
    statistic: Statistic,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """The figure `statistic` with its interval. domains: (num_items, num_columns) each; one for a single domain."""
    domains = [np.asarray(columns, dtype=np.float64) for columns in domains]
    assert domains and all(columns.ndim == 2 and len(columns) for columns in domains), "each domain needs an item"
    totals = [columns.sum(axis=0) for columns in domains]
    value = float(statistic(totals))
    num_units = sum(len(columns) for columns in domains)
    if min(len(columns) for columns in domains) < 2:
        return Estimate(value, None, None, num_units)
    rng = np.random.default_rng(seed)
    resampled = statistic([_resampled_sums(columns, rng, num_resamples) for columns in domains])
    low, high, method = _ends(domains, totals, statistic, resampled, value, level)
    interval = Interval(low, high, level, method)
    return Estimate(value, interval, float(resampled.std(ddof=1)), num_units)


def mean(
    values: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean of `values` (num_items,) or (num_items, num_samples): samples are averaged within their item first.

    For a paired difference give the differences. `clusters`: the cluster of each item; then clusters are drawn.
    """
    values = within_item(values)
    return ratio(values, np.ones(len(values)), clusters=clusters, seed=seed, num_resamples=num_resamples, level=level)


def ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Sum of `numerators` over sum of `denominators`, both (num_items,): bits over bytes, per document."""
    columns = _with_length(by_cluster(np.column_stack([numerators, denominators]), clusters))
    return bootstrap([columns], _mean_of_ratios, seed=seed, num_resamples=num_resamples, level=level)


def ratio_difference(
    numerators: np.ndarray,
    denominators: np.ndarray,
    baseline_numerators: np.ndarray,
    baseline_denominators: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """`ratio` of a model less that of the baseline on the same items; their denominators may differ."""
    columns = np.column_stack([numerators, denominators, baseline_numerators, baseline_denominators])
    return bootstrap(
        [_with_length(by_cluster(columns, clusters))],
        _mean_of_ratio_differences,
        seed=seed,
        num_resamples=num_resamples,
        level=level,
    )


def macro_ratio(
    domains: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean over domains of each domain's ratio of sums; `domains`: (numerators, denominators) per domain.

    With denominators of one it is the mean of the domains' means.
    """
    columns = [_with_length(np.column_stack(pair)) for pair in domains]
    return bootstrap(columns, _mean_of_ratios, seed=seed, num_resamples=num_resamples, level=level)


def macro_ratio_difference(
    domains: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """`macro_ratio` of a model less that of the baseline; per domain the four arrays of `ratio_difference`."""
    columns = [_with_length(np.column_stack(parts)) for parts in domains]
    return bootstrap(columns, _mean_of_ratio_differences, seed=seed, num_resamples=num_resamples, level=level)


def quantile(
    values: np.ndarray, q: float = 0.5, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> Estimate:
    """The `q`-quantile of `values` (num_items,), percentile interval: BCa is unreliable for what is not smooth."""
    values = np.asarray(values, dtype=np.float64)
    value = float(np.quantile(values, q))
    if len(values) < 2:
        return Estimate(value, None, None, len(values))
    rng = np.random.default_rng(seed)
    parts = [np.quantile(values[drawn], q, axis=1) for drawn in _draws(rng, len(values), num_resamples)]
    resampled = np.concatenate(parts)
    low, high = np.quantile(resampled, _tails(level, len(values)))
    interval = Interval(float(low), float(high), level, "percentile")
    return Estimate(value, interval, float(resampled.std(ddof=1)), len(values))


def within_item(values: np.ndarray) -> np.ndarray:
    """(num_items,) as it is; of (num_items, num_samples) the mean over samples, missing ones (NaN) left out."""
    values = np.asarray(values, dtype=np.float64)
    return values if values.ndim == 1 else np.nanmean(values, axis=1)


def by_cluster(columns: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    """(num_items, num_columns) summed within clusters, in the order in which clusters first appear."""
    if clusters is None:
        return columns
    assert len(clusters) == len(columns), "every item needs its cluster"
    place = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    summed = np.zeros((len(place), columns.shape[1]))
    np.add.at(summed, [place[cluster] for cluster in clusters], columns)
    return summed


def _with_length(columns: np.ndarray) -> np.ndarray:
    """Without units whose denominators (every other column) are zero: a sample of them alone would have no ratio."""
    return columns[(columns[:, 1::2] > 0).all(axis=1)]


# --- statistics --------------------------------------------------------------------------------------------------


def _mean_of_ratios(sums: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean([domain[..., 0] / domain[..., 1] for domain in sums], axis=0)


def _mean_of_ratio_differences(sums: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(
        [domain[..., 0] / domain[..., 1] - domain[..., 2] / domain[..., 3] for domain in sums],
        axis=0,
    )


# --- resampling --------------------------------------------------------------------------------------------------


def _draws(rng: np.random.Generator, num_items: int, num_resamples: int):
    """Indices of drawn items, (some, num_items) at a time, `num_resamples` rows in all."""
    rows_at_once = max(1, CHUNK_CELLS // num_items)
    for start in range(0, num_resamples, rows_at_once):
        yield rng.integers(num_items, size=(min(rows_at_once, num_resamples - start), num_items))


def _resampled_sums(columns: np.ndarray, rng: np.random.Generator, num_resamples: int) -> np.ndarray:
    """(num_items, C) -> (num_resamples, C)"""
    parts = [
        np.stack([column[drawn].sum(axis=1) for column in columns.T], axis=1)
        for drawn in _draws(rng, len(columns), num_resamples)
    ]
    return np.concatenate(parts)


def _tails(level: float, num_units: int, num_domains: int = 1) -> np.ndarray:
    """Shares of the resamples below the two ends: 2.5% and 97.5% for very many items, further out for few."""
    freedom = num_units - num_domains
    z = stdtrit(freedom, (1 + level) / 2) * np.sqrt(num_units / freedom)
    return ndtr(np.array([-z, z]))


def _ends(
    domains: Sequence[np.ndarray],
    totals: Sequence[np.ndarray],
    statistic: Statistic,
    resampled: np.ndarray,
    value: float,
    level: float,
) -> tuple[float, float, IntervalMethod]:
    tails = _tails(level, sum(len(columns) for columns in domains), len(domains))
    method: IntervalMethod = "percentile"
    acceleration = _acceleration(domains, totals, statistic, value)
    # Half of the ties count as below, so that a coarse statistic (right or wrong) is not taken for a biased one.
    below = float(np.mean(resampled < value) + np.mean(resampled == value) / 2)
    if acceleration is not None and 0 < below < 1:
        shifted = ndtri(below) + ndtri(tails)
        shrink = 1 - acceleration * shifted
        if (shrink > 0).all():
            tails, method = ndtr(ndtri(below) + shifted / shrink), "bca"
    low, high = np.quantile(resampled, tails)
    return float(low), float(high), method


def _acceleration(
    domains: Sequence[np.ndarray], totals: Sequence[np.ndarray], statistic: Statistic, value: float
) -> float | None:
    """A sixth of the skewness of the figure, by leaving out one item at a time; None where BCa does not apply."""
    if min(len(columns) for columns in domains) < MIN_UNITS_FOR_BCA:
        return None
    second = third = 0.0
    for index, columns in enumerate(domains):
        without = [*totals[:index], totals[index] - columns, *totals[index + 1 :]]
        others = [np.broadcast_to(sums, (len(columns), sums.shape[-1])) for sums in without]
        left_out = statistic(others)
        if not np.isfinite(left_out).all():
            return None
        num_items = len(columns)
        influence = (num_items - 1) * (left_out.mean() - left_out)
        second += (influence**2).sum() / num_items**2
        third += (influence**3).sum() / num_items**3
    # subtle: items that do not differ leave rounding errors, whose skewness would be noise
    if second <= (1e-12 * max(abs(value), 1e-300)) ** 2:
        return None
    return third / (6 * second**1.5)
