"""The two values that a measurement ends in: an interval, and an estimate with its interval."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

IntervalMethod = Literal["bca", "percentile", "wilson", "tango", "student", "order"]


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

    def stretched(self, ends: float, error: float) -> Estimate:
        """The same figure, its interval's ends `ends` times as far away and its standard error `error` times as large.

        For items that are not independent: see `ensembles.comparison.dependence`.
        """
        if self.interval is None or self.standard_error is None:
            return self
        low = self.value - ends * (self.value - self.interval.low)
        high = self.value + ends * (self.interval.high - self.value)
        return replace(
            self, interval=replace(self.interval, low=low, high=high), standard_error=error * self.standard_error
        )
