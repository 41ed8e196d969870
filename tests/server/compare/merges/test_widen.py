"""WIDEN against the same formulas written down once more, column by column, in NumPy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ensemble_server.server.compare.merges.widen import widen


def scores_of(places: list[list[float]], ratio: float, calibrated: float) -> list[list[float]]:
    """places: of each model, of each column."""
    found = []
    for of_model in places:
        mean = sum(map(Fraction, of_model)) / len(of_model)
        row = []
        for column, place in enumerate(of_model):
            total = sum(math.exp(other[column]) for other in places)
            row.append(calibrated if place > Fraction(ratio) * mean else math.exp(place) / total)
        found.append(row)
    return found


def ranked(values: list[float]) -> list[Fraction]:
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    return [Fraction(order.index(index), len(values)) for index in range(len(values))]


def reference(base: np.ndarray, models: list[np.ndarray], ratio: float = 1.0, calibrated: float = 1.0) -> np.ndarray:
    if base.ndim == 1:
        weights = scores_of([list(np.abs(model - base)) for model in models], ratio, calibrated)
        return base + sum(np.array(weight) * (model - base) for weight, model in zip(weights, models, strict=True))
    by_size, by_direction = [], []
    for model in models:
        columns = [(model[:, j], base[:, j]) for j in range(base.shape[1])]
        by_size.append(ranked([abs(math.hypot(*ours) - math.hypot(*theirs)) for ours, theirs in columns]))
        by_direction.append(
            ranked([1 - ours @ theirs / (math.hypot(*ours) * math.hypot(*theirs)) for ours, theirs in columns])
        )
    first, second = (scores_of(places, ratio, calibrated) for places in (by_size, by_direction))
    merged = base.copy()
    for n, model in enumerate(models):
        for j in range(base.shape[1]):
            merged[:, j] += (first[n][j] + second[n][j]) / 2 * (model[:, j] - base[:, j])
    return merged


@pytest.mark.parametrize("shape", [(3, 4), (5, 2), (2, 7), (6,)])
@pytest.mark.parametrize(("ratio", "calibrated"), [(1.0, 1.0), (0.5, 0.7), (1.5, 1.0)])
@pytest.mark.parametrize("num_models", [1, 2, 4])
def test_widen_is_what_its_formulas_say(shape, ratio, calibrated, num_models) -> None:
    rng = np.random.default_rng(num_models)
    base = rng.standard_normal(shape)
    models = [base + 0.3 * rng.standard_normal(shape) for _ in range(num_models)]
    found = widen(
        torch.tensor(base),
        [torch.tensor(model) for model in models],
        above_average_value_ratio=ratio,
        score_calibration_value=calibrated,
    )
    np.testing.assert_allclose(found.numpy(), reference(base, models, ratio, calibrated), rtol=0, atol=1e-12)


def test_two_columns_by_hand() -> None:
    """Column 0 grows from 1 to 3 (Δm 2, Δd 0), column 1 turns by a right angle (Δm 0, Δd 1). Ranks of Δm: 1/2 and 0, of
    Δd: 0 and 1/2, their means 1/4: above it the score is 1, below it the softmax over one model, which is 1, too."""
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    assert torch.equal(widen(base, [model]), model)
    # With a calibrated score of 0 each column keeps half of its change: the half that did not move it most.
    assert torch.equal(widen(base, [model], score_calibration_value=0.0), (base + model) / 2)


def test_of_embeddings_a_row_is_a_column() -> None:
    rng = np.random.default_rng(0)
    base, model = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    found = widen(torch.tensor(base), [torch.tensor(model)] * 2, is_embedding=True)
    np.testing.assert_allclose(found.numpy(), reference(base.T, [model.T] * 2).T, atol=1e-12)


def test_models_that_are_the_base_change_nothing_and_zeros_are_no_fault() -> None:
    base = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert torch.equal(widen(base, [base, base]), base)
    assert widen(base, [torch.ones(2, 2), base]).isfinite().all()
    assert widen(base.half(), [base.half()]).dtype == torch.float16
