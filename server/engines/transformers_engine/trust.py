"""How often what a member wrote ahead of one choice was right."""

from __future__ import annotations

FIRST_CHANCE, FIRST_TRIALS = 0.8, 4.0  # that a token is right, before anything was seen, and as how much of it
MEMORY = 0.95  # what a trial weighs after another
RELIEF = 0.99  # what it weighs after a step in which nothing was drafted: what failed is tried again some time


class Trust:
    def __init__(self) -> None:
        self._trials = FIRST_TRIALS
        self._successes = FIRST_TRIALS * FIRST_CHANCE

    @property
    def chance(self) -> float:
        """That a token is right, if those before it were."""
        return self._successes / self._trials

    def observe(self, num_drafted: int, num_right: int) -> None:
        """Of a draft the first `num_right` tokens were right; what came behind the first wrong one says nothing."""
        for is_right in [True] * num_right + [False] * (num_right < num_drafted):
            self._trials = MEMORY * self._trials + 1
            self._successes = MEMORY * self._successes + is_right

    def rest(self) -> None:
        """A step went by without a draft."""
        self._trials = RELIEF * self._trials + (1 - RELIEF) * FIRST_TRIALS
        self._successes = RELIEF * self._successes + (1 - RELIEF) * FIRST_TRIALS * FIRST_CHANCE
