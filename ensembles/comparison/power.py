"""What a comparison could have seen at all."""

from __future__ import annotations

from scipy.special import ndtri


def minimal_detectable_effect(standard_error: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test at `level` finds with probability `power`.

    (z for the level + z for the power) x standard error of the difference: 2.80 standard errors as it stands. In the
    unit of the difference; normal approximation (Miller 2024, section 5).
    """
    return float(ndtri((1 + level) / 2) + ndtri(power)) * standard_error
