"""So much a minute: the amounts of the last 60 seconds, counted by the second.

A window and no bucket that refills: of `limit` requests a minute no 60 seconds ever see more. Amounts may be added
beyond the limit, since the tokens of an answer are known only when it is written; whoever comes next then waits. The
windows of the package `limits` refuse what does not fit, which is why these are our own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60


class MinuteWindow:
    """`limit` a minute. `clock` gives seconds. Belongs to one thread."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque()  # (second, amount), oldest first
        self._used = 0

    def add(self, amount: int) -> None:
        """Count `amount` now; a negative one gives back."""
        self._forget()
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            amount_before = self._seconds.pop()[1]
            self._seconds.append((second, amount_before + amount))
        else:
            self._seconds.append((second, amount))
        self._used += amount

    @property
    def remaining(self) -> int:
        self._forget()
        return max(0, self.limit - self._used)

    def wait_s(self) -> float:
        """Seconds until there is room for one more; 0 if there is now."""
        self._forget()
        left = self._used
        if left < self.limit:
            return 0.0
        for second, amount in self._seconds:
            left -= amount
            if left < self.limit:
                return self._gone_in_s(second)
        raise AssertionError("an empty window has room")

    def reset_s(self) -> float:
        """Seconds until the whole limit is free again, if nothing more is asked."""
        self._forget()
        return self._gone_in_s(self._seconds[-1][0]) if self._seconds else 0.0

    def _gone_in_s(self, second: int) -> float:
        """What was counted in `second` counts until 60 s after the end of it."""
        return second + 1 + WINDOW_S - self._clock()

    def _forget(self) -> None:
        now = self._clock()
        while self._seconds and self._seconds[0][0] + 1 + WINDOW_S <= now:
            self._used -= self._seconds.popleft()[1]
