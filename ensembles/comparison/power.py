"""What a comparison could have seen at all, and how many items a verdict needs.

For the test that is made. One of m comparisons that Holm's correction takes together is found significant for certain
only if its p-value is at most alpha / m: so small it must be when it stands first. All figures here use that level, so
they promise no more than the report keeps.

Reference for the exact power of McNemar's test: Duffy 1984, "Asymptotic and exact power for the McNemar test".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import bdtr, bdtrik, gammaln, nctdtr, ndtri, stdtrit

POWER = 0.8
NUM_HALVINGS = 24  # to seven digits of what can be found at all


class Sensitivity(Protocol):
    """What a test on these items can see."""

    def detectable(self, *, alpha: float, num_comparisons: int = 1, power: float = POWER) -> float | None:
        """The smallest true difference that is found with probability `power`; None if none is."""


@dataclass(frozen=True)
class OfMean:
    """A mean, or a ratio, with its standard error: Student's test, or sign flips, which have the same power.

    In the unit of the standard error; for very many items 2.80 of them (Miller 2024, section 5).
    """

    standard_error: float
    freedom: float
    smallest_p: float = 0.0

    def detectable(self, *, alpha: float, num_comparisons: int = 1, power: float = POWER) -> float | None:
        level = alpha / num_comparisons
        if self.smallest_p > level:
            return None
        return _noncentrality(level, self.freedom, power) * self.standard_error


@dataclass(frozen=True)
class OfRightWrong:
    """McNemar's exact test on `num_items`, of which `num_divided` divided the models."""

    num_items: float
    num_divided: float

    def detectable(self, *, alpha: float, num_comparisons: int = 1, power: float = POWER) -> float | None:
        """In shares. The share of items that divide the models stays as it was seen (one more of two more items, so
        that none is not taken for never), or is as large as the difference itself needs it to be."""
        level = alpha / num_comparisons
        num_items = math.floor(self.num_items)
        divided = (self.num_divided + 1) / (self.num_items + 2)
        if num_items < 1 or mcnemar_power(num_items, 1.0, 0.0, level) < power:
            return None

        def is_found(difference: float) -> bool:
            share = max(divided, difference)
            return mcnemar_power(num_items, (share + difference) / 2, (share - difference) / 2, level) >= power

        return _least(is_found, 0.0, 1.0)


@dataclass(frozen=True)
class OfClusters:
    """Sign flips of whole clusters of right and wrong answers: what their mean can show, and no less than so many
    independent items could. `items`: as many as the clusters are worth, by their design effect."""

    mean: OfMean
    items: OfRightWrong

    def detectable(self, *, alpha: float, num_comparisons: int = 1, power: float = POWER) -> float | None:
        """As large as both need it; None if one of them can show nothing. Clusters that are alike by chance have a mean
        that seems to be known exactly, few of them a test that nothing can pass."""
        both = [
            part.detectable(alpha=alpha, num_comparisons=num_comparisons, power=power)
            for part in (self.mean, self.items)
        ]
        return None if None in both else max(one for one in both if one is not None)


def mcnemar_power(num_items: int, only_model: float, only_baseline: float, alpha: float) -> float:
    """How often McNemar's exact test says that there is a difference, given the shares of items that only one of the
    two gets right. Exact: summed over how many items divide the models, and how."""
    divided = only_model + only_baseline
    if divided <= 0:
        return 0.0
    counts = np.arange(1, num_items + 1)
    probabilities = _binomial(counts, num_items, min(divided, 1.0))
    kept = probabilities > 1e-12
    counts, probabilities = counts[kept], probabilities[kept]
    fewest = _most_extreme(counts, alpha)  # up to so many of `counts` on one side is significant
    share = only_model / divided
    tails = bdtr(fewest, counts, share) + bdtr(fewest, counts, 1 - share)
    return float(probabilities @ np.where(fewest >= 0, tails, 0.0))


def items_for_any_verdict(num_comparisons: int, *, alpha: float) -> int:
    """Questions of which every single one must divide two models the same way before one can be called better."""
    return math.ceil(1 + math.log2(num_comparisons / alpha))


def items_for_equivalence(margin: float, *, alpha: float) -> int | None:
    """Questions that must all be answered alike before "no difference shown" can be said; None for a margin of 0."""
    if margin <= 0:
        return None
    square = float(ndtri(1 - alpha / 2)) ** 2
    return math.ceil(square * (1 / margin - 1) * (1 - 1e-12))


def items_for_difference(difference: float, divided: float, num_comparisons: int, *, alpha: float) -> int:
    """Questions that show a true `difference` of shares four times in five if `divided` of them divide the models."""
    divided = max(divided, difference)

    def is_found(num_items: int) -> bool:
        shares = (divided + difference) / 2, (divided - difference) / 2
        return mcnemar_power(num_items, *shares, alpha / num_comparisons) >= POWER

    return _fewest(is_found)


def units_for_effect(effect: float, num_comparisons: int, *, alpha: float) -> int:
    """Documents that show a mean difference of `effect` standard deviations (of documents) four times in five."""

    def is_found(num_units: int) -> bool:
        freedom = num_units - 1
        return freedom > 0 and _noncentrality(alpha / num_comparisons, freedom, POWER) <= effect * math.sqrt(num_units)

    return _fewest(is_found)


def effect_of_units(num_units: float, num_comparisons: int, *, alpha: float) -> float | None:
    """The other way round: the mean difference, in standard deviations of documents, that so many documents show."""
    if num_units <= 1:
        return None
    return _noncentrality(alpha / num_comparisons, num_units - 1, POWER) / math.sqrt(num_units)


# --- pieces ------------------------------------------------------------------------------------------------------


def _noncentrality(alpha: float, freedom: float, power: float) -> float:
    """How many standard errors away from 0 the truth must be for Student's test to say so with `power`."""
    threshold = float(stdtrit(freedom, 1 - alpha / 2))
    upper = threshold + 1.0
    while 1 - nctdtr(freedom, upper, threshold) < power:
        upper *= 2
    return _least(lambda at: bool(1 - nctdtr(freedom, at, threshold) >= power), 0.0, upper)


def _binomial(counts: np.ndarray, num_items: int, share: float) -> np.ndarray:
    if share >= 1:
        return (counts == num_items).astype(np.float64)
    ways = gammaln(num_items + 1) - gammaln(counts + 1) - gammaln(num_items - counts + 1)
    return np.exp(ways + counts * math.log(share) + (num_items - counts) * math.log1p(-share))


def _most_extreme(counts: np.ndarray, alpha: float) -> np.ndarray:
    """For each count the largest k for which k of so many on one side is significant, two-sided; -1 if none is."""
    fewest = np.full(len(counts), -1.0)
    can = 2.0 ** (1.0 - counts) <= alpha
    large = counts[can].astype(np.float64)
    guess = np.floor(bdtrik(alpha / 2, large, 0.5))
    guess += bdtr(guess + 1, counts[can], 0.5) <= alpha / 2  # the inverse is exact up to rounding
    guess -= bdtr(guess, counts[can], 0.5) > alpha / 2
    fewest[can] = guess
    return fewest


def _least(is_found: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest value for which a condition holds that goes on to hold above it, up to `high`."""
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def _fewest(is_found: Callable[[int], bool]) -> int:
    high = 2
    while not is_found(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high
