"""Models whose endpoint nothing gets through to: rows wait, and one of them tries again from time to time.

    1, 2, 4, 8, ... at most 60 seconds between two tries

A row that failed only because a member was out of reach is not spent. All other rows of the same model wait with it;
whichever asks first when the time is over tries, and its success lets the others go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FIRST_S, MAX_S = 1.0, 60.0


@dataclass
class _Outage:
    next_try_s: float
    num_tries: int
    is_trying: bool = False


class Outages:
    """The outages of a run, by the names of the models that rows ask. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float], say: Callable[[str], None] = lambda text: None) -> None:
        self._clock = clock
        self._say = say
        self._outages: dict[str, _Outage] = {}

    def __contains__(self, model: str) -> bool:
        return model in self._outages

    def wait_s(self, model: str) -> float:
        """Seconds until a row of this model may ask for its turn; 0: it is its turn, and `failed` or `over` must be
        told what came of it."""
        outage = self._outages[model]
        if outage.is_trying:
            return FIRST_S
        outage.is_trying = (left_s := outage.next_try_s - self._clock()) <= 0
        return max(0.0, left_s)

    def failed(self, model: str, reason: str, *, was_turn: bool) -> bool:
        """A row did not get through. Returns whether this was a try: rows that were under way when the outage began
        add nothing to it."""
        outage = self._outages.get(model)
        if outage is not None and not was_turn:
            return False
        num_tries = 1 if outage is None else outage.num_tries + 1
        wait_s = min(MAX_S, FIRST_S * 2.0 ** min(num_tries - 1, 60))
        self._outages[model] = _Outage(self._clock() + wait_s, num_tries)
        self._say(f"waits {wait_s:g} s and tries again: {reason}")
        return True

    def over(self, model: str) -> None:
        """A row of this model got through."""
        if self._outages.pop(model, None) is not None:
            self._say(f"model {model!r} answers again")
