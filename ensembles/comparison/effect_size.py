"""How large a difference is, apart from how sure one is of it."""

from __future__ import annotations

import math

import numpy as np


def cohens_h(share: float, baseline_share: float) -> float:
    """Difference of two shares on the arcsine scale (Cohen 1988): 0.2 is small, 0.5 medium, 0.8 large."""
    return 2 * math.asin(math.sqrt(share)) - 2 * math.asin(math.sqrt(baseline_share))


def cohens_d_z(differences: np.ndarray) -> float:
    """Mean of paired differences over their standard deviation; 0 if there is no difference, ±inf if all are equal."""
    differences = np.asarray(differences, dtype=np.float64)
    centre = float(differences.mean())
    if centre == 0:
        return 0.0
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return centre / spread if spread > 1e-12 * abs(centre) else math.copysign(math.inf, centre)


def discordant_odds(only_model: int, only_baseline: int) -> float:
    """Odds that an item which divides the models is the model's: (b + 1/2) / (c + 1/2), so that zeros are finite."""
    return (only_model + 0.5) / (only_baseline + 0.5)
