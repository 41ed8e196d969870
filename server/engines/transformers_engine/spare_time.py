"""What makes later steps faster, done a piece at a time: while nobody waits, and beside steps in a tenth of their time.

Only beside steps of few tokens, as decoding is made of: what reads prompts and texts all the time would not gain.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain

logger = logging.getLogger(__name__)

SHARE = 0.1  # of the time that steps take
MAX_TOKENS = 32  # of a step that counts


class SpareTime:
    """Belongs to the engine's thread. `chores`: each does one piece of work with each `next`."""

    def __init__(self, chores: Iterable[Iterator[None]]) -> None:
        self._pieces = chain.from_iterable(chores)
        self._earned_s = 0.0
        self.has_work = True

    def work(self) -> None:
        """One piece. Nothing raises: the engine can do without."""
        started = time.perf_counter()
        try:
            next(self._pieces)
        except StopIteration:
            self.has_work = False
        except Exception:
            logger.warning("steps stay as fast as they are", exc_info=True)
            self.has_work = False
        self._earned_s -= time.perf_counter() - started

    def after_step(self, num_tokens: int, duration_s: float) -> None:
        """A step is over: a piece, if steps have earned it."""
        if not self.has_work or num_tokens > MAX_TOKENS:
            return
        self._earned_s = min(self._earned_s, 0.0) + SHARE * duration_s
        if self._earned_s > 0:
            self.work()
