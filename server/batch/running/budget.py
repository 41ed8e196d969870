"""One limit of time for a whole job, shared out among its rows; what a row leaves over goes back to all others.

    allowance = time left / ceil(rows to begin / rows at once),   at most `per_row_max_s`

Rows at once share the clock, so the rows that are left come in that many rounds, and the row that begins now gets a
round. If every row takes all it was allowed, the last ends as the budget does; none is left without time (tested). A
row that needs less leaves more for each of the rest, up to the most that one row may have.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

RESERVED_SHARE = 0.02  # of the budget, kept for answers that close late and for writing the output ...
MAX_RESERVED_S = 30.0  # ... but no more than this

_DURATION = re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?")
_ONE_UNIT = re.compile(r"(?P<number>\d+\.\d+)(?P<unit>[dhm])")
_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds: "4h45m" -> 17100.0, "90" and "90s" -> 90.0, "1.5h" -> 5400.0. Raises `ValueError`."""
    compact = text.strip().replace(" ", "").lower()
    if one := _ONE_UNIT.fullmatch(compact):
        seconds = float(one["number"]) * _UNITS_S[one["unit"]]
    elif found := _DURATION.fullmatch(compact):
        seconds = sum(float(number) * _UNITS_S[unit] for unit, number in found.groupdict().items() if number)
    else:
        seconds = 0.0
    if seconds <= 0:
        raise ValueError(f"must be a time above zero such as 4h45m, 90s or 1.5h, got {text!r}")
    return seconds


class TimeBudget:
    """A `runner.RowBudget` over `total_s` seconds from now on, for a run that keeps `at_once` rows in flight.

    Without `total_s` rows have only their own limit, `per_row_max_s`. `clock` gives seconds from any origin.
    """

    def __init__(
        self,
        total_s: float | None,
        *,
        at_once: int,
        per_row_max_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert at_once >= 1, f"at least one row runs at once, got {at_once}"
        self.per_row_max_s = per_row_max_s
        self._at_once = at_once
        self._clock = clock
        self._end: float | None = None
        if total_s is not None:
            self._end = clock() + total_s - min(RESERVED_SHARE * total_s, MAX_RESERVED_S)
        self.num_cut_short = 0  # rows that used up what they were allowed
        self.banked_s = 0.0  # that rows were allowed and left over

    @property
    def left_s(self) -> float | None:
        """Seconds until the rows' time is over; None without a total."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def allowance_s(self, num_left: int) -> float | None:
        """See `runner.RowBudget`. 0 once the budget is spent: such a row ends at once, as one that has no answer."""
        limits = [] if self.per_row_max_s is None else [self.per_row_max_s]
        if (left_s := self.left_s) is not None:
            limits.append(left_s / math.ceil(max(1, num_left) / self._at_once))
        return min(limits, default=None)

    def ended(self, allowed_s: float | None, used_s: float) -> None:
        if allowed_s is None:
            return
        self.num_cut_short += used_s >= allowed_s
        self.banked_s += max(0.0, allowed_s - used_s)
