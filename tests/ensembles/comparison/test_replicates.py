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


def test_the_same_seed_gives_the_same_interval():
    one, two, other = (crossed_ratio_difference(*columns([1.0, 2.0]), seed=seed) for seed in (0, 0, 1))
    assert one == two != other
