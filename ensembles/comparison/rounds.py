"""Timings in a few rounds: a median, and how far it is known.

With n rounds the true median lies between the lowest and the highest with probability 1 - 2^(1-n), whatever their
distribution (the sign test turned around): 50% for two rounds, 75% for three, 97% for six. So below MIN_ROUNDS there is
no interval, only a range to be called what it is; from there on the interval is the narrowest pair of ordered values
that holds the median with the wanted probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from ensemble_server.ensembles.comparison.intervals import Interval


@dataclass(frozen=True)
class Rounds:
    """`lowest`, `highest`: of all rounds; `interval`: of the median, None with too few rounds for one."""

    median: float
    lowest: float
    highest: float
    num_rounds: int
    interval: Interval | None


def of_rounds(values: Sequence[float], *, level: float = 0.95) -> Rounds:
    """values: one for each round, at least one."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    num = len(ordered)
    inside = _left_out(num, level)
    interval = None
    if inside is not None:
        interval = Interval(float(ordered[inside]), float(ordered[num - 1 - inside]), level, "order")
    return Rounds(float(np.median(ordered)), float(ordered[0]), float(ordered[-1]), num, interval)


def min_rounds(level: float = 0.95) -> int:
    """From so many rounds on there is an interval: 6 at 95%."""
    num = 1
    while _left_out(num, level) is None:
        num += 1
    return num


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round down falls out. Rounds that one of them lacks do not count."""
    return [ours / theirs for ours, theirs in zip(values, baseline, strict=False) if theirs > 0]


def _left_out(num: int, level: float) -> int | None:
    """How many values at each end the interval may leave out; None if even all of them are too few."""
    outside = [2 * float(bdtr(rank, num, 0.5)) for rank in range((num + 1) // 2)]
    allowed = [rank for rank, probability in enumerate(outside) if probability <= 1 - level]
    return max(allowed, default=None)
