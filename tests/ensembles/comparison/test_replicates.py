from __future__ import annotations

import numpy as np
import pytest

from ensemble_server.ensembles.comparison.replicates import crossed_ratio_difference


def columns(shift_per_replicate: list[float], num_documents: int = 20, seed: int = 0):
    rng = np.random.default_rng(seed)
    base = rng.normal(100, 10, num_documents)
    ours = np.stack([base + shift for shift in shift_per_replicate])
    size = np.full(ours.shape, 10.0)
    return ours, size, np.stack([base] * len(ours)), size


def test_the_value_is_the_mean_of_the_replicates_differences():
    found = crossed_ratio_difference(*columns([1.0, 2.0, 6.0]))
    assert found.value == pytest.approx(0.3)
    assert found.interval.low < 0.3 < found.interval.high


def test_replicates_that_agree_have_a_narrow_interval_and_those_that_do_not_a_wide_one():
    agreeing = crossed_ratio_difference(*columns([3.0, 3.0, 3.0]))
    differing = crossed_ratio_difference(*columns([-3.0, 3.0, 9.0]))
    assert agreeing.interval.high - agreeing.interval.low < 1e-9
    assert differing.interval.low < 0 < differing.interval.high


def test_one_replicate_has_no_interval():
    assert crossed_ratio_difference(*columns([1.0])).interval is None


def test_documents_in_clusters_widen_the_interval():
    parts = columns([1.0, 2.0], num_documents=6)
    rng = np.random.default_rng(1)
    noisy = (parts[0] + rng.normal(0, 5, 6), *parts[1:])
    copied = tuple(np.repeat(part, 5, axis=1) for part in noisy)
    plain = crossed_ratio_difference(*noisy)
    clustered = crossed_ratio_difference(*copied, clusters=[n // 5 for n in range(30)])
    assert clustered.standard_error == pytest.approx(plain.standard_error)
    assert crossed_ratio_difference(*copied).standard_error < plain.standard_error


def test_three_seeds_hold_the_truth_as_often_as_they_say():
    """400 simulated sets of three seeds whose differences vary by training alone; 95% ± 3.3% is three errors."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        shifts = rng.normal(0, 1, 3)
        hits += 0 in crossed_ratio_difference(*columns(list(shifts), num_documents=12)).interval
    assert 0.95 - 0.033 <= hits / 400 <= 0.95 + 0.033
