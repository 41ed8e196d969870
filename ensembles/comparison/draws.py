"""When two figures are the same: smaller differences are those of arithmetic, and no win for anybody.

The same weights, read in a batch of another shape, give a text bits per byte that differ in the seventh digit or later.
"""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-6  # relative: of figures that are sums of float32 log-probabilities


def without_rounding(differences: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """The differences, with zeros for those that are no larger than rounding makes them beside figures of this size."""
    return np.where(np.abs(differences) <= ROUNDING * np.abs(size), 0.0, differences)
