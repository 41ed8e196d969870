"""Intervals of a share of right answers that hold for few items, and for shares near 0 and 1."""

from __future__ import annotations

import math

from scipy.special import ndtri

from ensemble_server.ensembles.comparison.intervals import Interval


def wilson(num_right: int, num_items: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval (1927): wilson(8, 10) -> 0.490 to 0.943. `num_items` at least 1."""
    if not 0 <= num_right <= num_items or num_items < 1:
        raise ValueError(f"needs 0 <= num_right <= num_items and an item, got {num_right} of {num_items}")
    z = float(ndtri((1 + level) / 2))
    share = num_right / num_items
    centre = share + z * z / (2 * num_items)
    half = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    low = 0.0 if num_right == 0 else (centre - half) / scale
    high = 1.0 if num_right == num_items else (centre + half) / scale
    return Interval(low, high, level, "wilson")
