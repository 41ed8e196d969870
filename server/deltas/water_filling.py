"""Which parts are worth their bytes, over all matrices at once.

Each part (a singular vector, a bit more for one, a plane of signs) takes a squared error away and costs bytes. The
error that is left is least, for a budget, if parts are taken by what they take away per byte: reverse water filling
(Cover & Thomas, Elements of Information Theory, 10.3.3), with singular vectors in the place of Gaussian sources.
"""

from __future__ import annotations

import numpy as np


def worth_their_bytes(gains: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """gains: (n,), squared error that each part takes away; costs: (n,), bytes. -> (n,) bool: what is taken.

    The best per byte first, equal ones in their order, until the next does not fit. Where the gains per byte of parts
    that build upon each other fall, none is taken without those before it.
    """
    order = np.argsort(-gains / costs, kind="stable")
    taken = np.zeros(len(gains), dtype=bool)
    taken[order[np.cumsum(costs[order]) <= budget]] = True
    return taken
