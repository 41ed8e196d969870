"""What a difference allows to say, by its interval against a margin.

    better                its interval lies beyond zero on the good side (and the adjusted p-value agrees, if given)
    worse                 the same on the bad side
    no difference shown   the interval holds zero and lies within ± margin: if there is a difference, it is too small
                          to matter
    inconclusive          anything else: zero is possible, and so is a difference that matters; more items would tell

The margin is the smallest difference that matters to whoever reads, in the unit of the difference.
"""

from __future__ import annotations

from typing import Literal

from ensemble_server.ensembles.comparison.intervals import Interval

Verdict = Literal["better", "worse", "no difference shown", "inconclusive"]


def verdict(
    interval: Interval | None,
    *,
    margin: float,
    higher_is_better: bool,
    adjusted_p_value: float | None = None,
    alpha: float = 0.05,
) -> Verdict:
    """`interval`: of model less baseline; None (too few items) is inconclusive. See the module's docstring."""
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin:g}")
    if interval is None:
        return "inconclusive"
    is_significant = adjusted_p_value is None or adjusted_p_value <= alpha
    if 0 not in interval and is_significant:
        return "better" if (interval.low > 0) == higher_is_better else "worse"
    return "no difference shown" if max(abs(interval.low), abs(interval.high)) <= margin else "inconclusive"
