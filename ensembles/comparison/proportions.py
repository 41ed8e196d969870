"""Intervals of shares of right answers, and of their difference, that hold for few items and near 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import ndtri, stdtrit

from ensemble_server.ensembles.comparison.intervals import Interval

NUM_HALVINGS = 60  # of a range of 2: the ends are exact to the last bits


def wilson(num_right: float, num_items: float, *, level: float = 0.95, freedom: float | None = None) -> Interval:
    """Wilson's score interval (1927): wilson(8, 10) -> 0.490 to 0.943.

    Counts may be broken numbers, as those of clustered items are once divided by their design effect; with `freedom`
    the tails are Student's, since few clusters say little of how much they differ.
    """
    if not 0 <= num_right <= num_items * (1 + 1e-12) or num_items <= 0:
        raise ValueError(f"needs 0 <= num_right <= num_items and an item, got {num_right} of {num_items}")
    z = _quantile(level, freedom)
    share = min(num_right / num_items, 1.0)
    centre = share + z * z / (2 * num_items)
    half = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    low = 0.0 if num_right == 0 else (centre - half) / scale
    high = 1.0 if share == 1 else (centre + half) / scale
    return Interval(low, high, level, "wilson")


def tango(
    only_model: float, only_baseline: float, num_items: float, *, level: float = 0.95, freedom: float | None = None
) -> Interval:
    """Score interval of the difference of two shares of the same items: the model's less the baseline's.

    `only_model`, `only_baseline`: items that only one of the two got right. All values of the difference that the
    score test does not reject, with the other parameter at its likeliest under each of them. Without any such item it
    is ± z² / (n + z²), not a point: that 6 questions were answered alike says little of the next one. Counts may be
    broken numbers, and `freedom` makes the tails Student's, as in `wilson`.

    Reference: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", 1998. tango(0, 0, 6) -> -0.390 to 0.390.
    """
    if min(only_model, only_baseline) < 0 or only_model + only_baseline > num_items * (1 + 1e-12) or num_items <= 0:
        raise ValueError(
            f"needs items, and no more that divide the models; got {only_model} and {only_baseline} of {num_items}"
        )
    z = _quantile(level, freedom)
    found = (only_model - only_baseline) / num_items

    def score(difference: float) -> float:
        """Falls as `difference` grows; 0 at what was found."""
        square = 2 * num_items
        linear = (2 * num_items - only_model + only_baseline) * difference - only_model - only_baseline
        constant = -only_baseline * difference * (1 - difference)
        of_baseline = (math.sqrt(max(linear**2 - 4 * square * constant, 0.0)) - linear) / (2 * square)
        variance = num_items * (2 * of_baseline + difference * (1 - difference))
        distance = only_model - only_baseline - num_items * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    low = -1.0 if found <= -1 else _crossing(lambda at: score(at) <= z, -1.0, found)
    high = 1.0 if found >= 1 else _crossing(lambda at: score(at) <= -z, found, 1.0)
    return Interval(low, high, level, "tango")


def _quantile(level: float, freedom: float | None) -> float:
    tail = (1 + level) / 2
    return float(ndtri(tail) if freedom is None else stdtrit(freedom, tail))


def _crossing(is_beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds at `high` and not at `low` begins to hold."""
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high
