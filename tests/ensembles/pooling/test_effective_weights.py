from __future__ import annotations

import pytest

from ensemble_server.ensembles.pooling import effective_weights


@pytest.mark.parametrize(
    ("weights", "effective"),
    [
        ([1, 3], [0.25, 0.75]),
        ([2.0], [1.0]),
        ([1, 1, -1], [1, 1, -1]),  # as written, once one is negative
        ([1e308, 1e308], [0.5, 0.5]),
        ([1e-300, 3e-300], [0.25, 0.75]),
    ],
)
def test_positive_weights_are_scaled_to_sum_to_one(weights: list[float], effective: list[float]) -> None:
    assert effective_weights(weights) == pytest.approx(effective)
