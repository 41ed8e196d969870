"""How long a forward of one set of weights takes by the number of its tokens, learnt from the forwards that are run.

What a further token costs differs between machines, kinds of weights and contexts by a factor of ten, so it is not
assumed but watched. A machine that others use, too, slows all numbers of tokens alike: what is seen of one moves the
others a little. What was not seen for a while is forgotten, so that one bad moment is not held against a number for
ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PER_TOKEN = 0.05  # of a forward's time, where nothing is known: little, so that it is tried
OWN, COMMON = 0.3, 0.15  # how fast what is seen of a number of tokens moves that number, and all others
MAX_JUMP = 2.0  # a forward that took longer by more is not believed
FORGOTTEN_AFTER = 256  # forwards


@dataclass
class Point:
    num_tokens: int
    seconds: float
    num_seen: int
    last_seen: int


class StepCosts:
    def __init__(self) -> None:
        self._points: dict[int, Point] = {}
        self._num_forwards = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A forward of `num_tokens` took so long."""
        self._num_forwards += 1
        size = _size_class(num_tokens)
        if (point := self._points.get(size)) is None:
            self._points[size] = Point(num_tokens, seconds, 1, self._num_forwards)
            return
        jump = min(max(seconds / point.seconds, 1 / MAX_JUMP), MAX_JUMP)
        for other in self._points.values():
            if other is not point:
                other.seconds *= jump**COMMON
        point.num_seen += 1
        point.seconds *= jump ** max(OWN, 1 / point.num_seen)
        point.num_tokens, point.last_seen = num_tokens, self._num_forwards
        if self._num_forwards % FORGOTTEN_AFTER == 0:
            horizon = self._num_forwards - FORGOTTEN_AFTER
            self._points = {size: point for size, point in self._points.items() if point.last_seen > horizon}

    def seconds(self, num_tokens: np.ndarray) -> np.ndarray:
        """num_tokens: (n,), -> (n,) seconds, never falling with the tokens. In units of their own before the first
        `observe`."""
        points = sorted(self._points.values(), key=lambda point: point.num_tokens)
        if not points:
            return 1 + PER_TOKEN * num_tokens
        known = np.array([point.num_tokens for point in points], dtype=float)
        seconds = np.maximum.accumulate([point.seconds for point in points])
        between = np.interp(num_tokens, known, seconds)  # beyond the known ones: as the nearest
        nearest = np.clip(num_tokens, known[0], known[-1])
        return between * (1 + PER_TOKEN * num_tokens) / (1 + PER_TOKEN * nearest)


def _size_class(num_tokens: int) -> int:
    """Small numbers by themselves, then two to an octave."""
    return num_tokens if num_tokens <= 8 else round(2 * math.log2(num_tokens)) + 8
