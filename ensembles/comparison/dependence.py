"""Items that are not independent: how many independent ones they are worth.

Two kinds. *Neighbours*: documents cut out of one text, each a little like the one before it. Their number is divided by
the design effect of a first-order autoregression,

    f = (1 + r) / (1 - r)          r: correlation of each document's figure with the next one's ("lag 1")

r is corrected for the bias that few items have (Marriott & Pope 1954: the plain estimate is too low by about
(1 + 4 r) / n) and never taken as negative. *Clusters*: questions on one passage, documents of one author, in no order.
There f is the variance of the clusters' sums over what it would be if items were independent (Kish 1965).

A standard error grows by √f, and its tails are Student's with n / f - 1 degrees of freedom. At a lag of 0.4 a 95%
interval that takes neighbours for independent holds the truth in 80% of cases; this one in 92 to 93% from 10 items on
(`benchmarks/comparison_levels.py`; blocks of n^(1/3) neighbours: 91 to 92%).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MIN_FOR_LAG = 6  # fewer items than this say nothing of their lag
MAX_LAG = 0.9
MIN_FREEDOM = 1.0


@dataclass(frozen=True)
class Dependence:
    """What `num_units` items are worth. `lag`: the correlation of neighbours as it was found; None if not looked at."""

    num_units: int
    design_effect: float = 1.0
    lag: float | None = None

    @property
    def effective_units(self) -> float:
        return self.num_units / self.design_effect

    @property
    def freedom(self) -> float:
        return max(self.effective_units - 1, MIN_FREEDOM)

    @property
    def error_factor(self) -> float:
        """By how much a standard error that took the items for independent is too small."""
        return self.design_effect**0.5

    def interval_factor(self, level: float) -> float:
        """The same for the ends of an interval, whose tails get longer, too."""
        if self.design_effect <= 1 or self.num_units < 2:
            return 1.0
        tail = (1 + level) / 2
        return float(self.error_factor * stdtrit(self.freedom, tail) / stdtrit(self.num_units - 1, tail))


def independent(num_units: int) -> Dependence:
    return Dependence(num_units)


def of_neighbours(values: np.ndarray) -> Dependence:
    """values: (num_items,) in the order in which the items stand in their text."""
    values = np.asarray(values, dtype=np.float64)
    lag = lag_correlation(values)
    used = min(max(lag or 0.0, 0.0), MAX_LAG)
    return Dependence(len(values), (1 + used) / (1 - used), lag)


def lag_correlation(values: np.ndarray) -> float | None:
    """Correlation of each value with the next, corrected for bias; None for too few values, or equal ones."""
    num = len(values)
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    square = float(centred @ centred)
    # subtle: values that do not differ leave rounding errors, whose correlation would be noise
    if num < MIN_FOR_LAG or square <= num * (1e-12 * float(np.abs(values).max())) ** 2:
        return None
    plain = float(centred[1:] @ centred[:-1]) / square
    return max(-1.0, min(1.0, (num * plain + 1) / (num - 4)))


def design_effect(values: np.ndarray, clusters: Sequence[object]) -> float:
    """Kish's: how much larger the variance of a mean is because items come in `clusters`. At least 1.

    values: (num_items,). If they do not differ nothing can be seen, and an item is taken to tell no more than its
    cluster does: items per cluster.
    """
    values = np.asarray(values, dtype=np.float64)
    place = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    if len(place) < 2:
        return float(len(values))
    centred = values - values.mean()
    variance = float(centred @ centred) / (len(values) - 1)
    largest = len(values) / len(place)
    if variance <= 0:
        return largest
    sums = np.zeros(len(place))
    np.add.at(sums, [place[cluster] for cluster in clusters], centred)
    between = float(sums @ sums) * len(place) / (len(place) - 1)
    return max(1.0, between / (len(values) * variance))
