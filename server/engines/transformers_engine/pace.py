"""How much background work a step may hold, so that an interactive request that arrives during it is not kept waiting.

A request that arrives waits for the running step, then for its own prompt to be read. If a step takes no longer than
reading a prompt does, its first token comes within twice the time that it takes on an idle engine. So the time that
interactive prompts took to be read is remembered, and the tokens of background work in a step follow from it. Before
the first interactive request nothing is held back: a batch without company runs at full speed.
"""

from __future__ import annotations

import math

MIN_TOKENS = 16  # per step; below, a step costs what it costs and background work would only become slower
MEMORY = 0.8  # weight of what was known of reading times when another comes in
FALL, RISE = 0.5, 1.25  # the fastest change of the allowance from one step to the next


class Pace:
    """`num_tokens`: how many tokens of background work, over all members, the next step may forward."""

    def __init__(self) -> None:
        self.num_tokens = math.inf
        self._reading_s: float | None = None

    def observe_reading(self, duration_s: float) -> None:
        """An interactive prompt was read in steps that took `duration_s` together."""
        known = self._reading_s
        self._reading_s = duration_s if known is None else MEMORY * known + (1 - MEMORY) * duration_s

    def observe_step(self, duration_s: float, num_tokens: int) -> None:
        """A step with `num_tokens` tokens of background work took `duration_s`."""
        if self._reading_s is None or not num_tokens:
            return
        ratio = self._reading_s / duration_s
        if ratio < 1:
            self.num_tokens = max(MIN_TOKENS, min(self.num_tokens, num_tokens) * max(ratio, FALL))
        elif num_tokens * RISE > self.num_tokens:  # the allowance was what bound it
            self.num_tokens *= min(ratio, RISE)
