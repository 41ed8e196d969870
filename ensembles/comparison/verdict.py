"""What a difference allows to say, by its interval against a margin.

    better, worse              its interval lies beyond zero (and the adjusted p-value agrees, if given)
    ... by less than the       the same, and the whole interval lies within ± margin: there is a difference, and it is
        margin                 too small to matter
    no difference shown        the interval lies within ± margin: if there is a difference, it is too small to matter
    too few items              nothing of this, and nothing of it could have come out: so few items cannot give a
                               p-value that stands beside the other comparisons
    inconclusive               anything else: zero is possible, and so is a difference that matters; more items would
                               tell
    nothing was answered       one of the two has no answer to any item, so what is compared is not how well they answer

The margin is the smallest difference that matters to whoever reads, in the unit of the difference.
"""

from __future__ import annotations

from typing import Literal

from ensemble_server.ensembles.comparison.intervals import Interval

Verdict = Literal[
    "better",
    "worse",
    "better by less than the margin",
    "worse by less than the margin",
    "no difference shown",
    "inconclusive",
    "too few items",
    "nothing was answered",
]


def verdict(
    interval: Interval | None,
    *,
    margin: float,
    higher_is_better: bool,
    adjusted_p_value: float | None = None,
    smallest_p_value: float = 0.0,
    alpha: float = 0.05,
    is_answered: bool = True,
) -> Verdict:
    """`interval`: of model less baseline, None with too few items. See the module's docstring.

    `smallest_p_value`: that the test can give on so many items, adjusted as `adjusted_p_value` would be if it came
    first. `is_answered`: whether both have an answer to some item.
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin:g}")
    if not is_answered:
        return "nothing was answered"
    if interval is None:
        return "too few items"
    is_small = max(abs(interval.low), abs(interval.high)) <= margin
    is_significant = adjusted_p_value is None or adjusted_p_value <= alpha
    if 0 not in interval and is_significant:
        is_better = (interval.low > 0) == higher_is_better
        if is_small:
            return "better by less than the margin" if is_better else "worse by less than the margin"
        return "better" if is_better else "worse"
    if is_small:
        return "no difference shown"
    return "too few items" if smallest_p_value > alpha else "inconclusive"
