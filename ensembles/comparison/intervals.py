"""The two values that a measurement ends in: an interval, and an estimate with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IntervalMethod = Literal["bca", "percentile", "wilson"]


@dataclass(frozen=True)
class Interval:
    """Where a figure lies with confidence `level`. Both ends belong to it."""

    low: float
    high: float
    level: float = 0.95
    method: IntervalMethod = "bca"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A figure of `num_units` items (or clusters of items), in the unit of what was measured.

    `interval` and `standard_error` are None where there are fewer than two units: one item says nothing of others.
    """

    value: float
    interval: Interval | None
    standard_error: float | None
    num_units: int
