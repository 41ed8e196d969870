import numpy as np
import pytest

from ensemble_server.ensembles.comparison.rounds import min_rounds, of_rounds, ratios


def test_few_rounds_have_a_range_and_no_interval():
    found = of_rounds([3.0, 1.0, 2.0])
    assert (found.median, found.lowest, found.highest, found.interval) == (2.0, 1.0, 3.0, None)
    assert of_rounds([5.0]).interval is None


def test_six_rounds_are_enough_for_an_interval_of_95_percent():
    # outside both ends: 2 / 2^6 = 3.1%; five rounds leave 6.3%
    assert min_rounds() == 6
    assert min_rounds(0.99) == 8
    interval = of_rounds([6.0, 2.0, 5.0, 1.0, 4.0, 3.0]).interval
    assert (interval.low, interval.high, interval.method) == (1.0, 6.0, "order")
    assert of_rounds(range(5)).interval is None


@pytest.mark.parametrize("num_rounds", [6, 9, 20])
def test_intervals_hold_the_median_of_any_distribution(num_rounds):
    """1000 sets of skewed timings; three standard errors are 2%."""
    rng = np.random.default_rng(num_rounds)
    hits = sum(np.log(2) in of_rounds(rng.exponential(size=num_rounds)).interval for _ in range(1000))
    assert hits / 1000 >= 0.95 - 0.02


def test_what_slows_a_round_down_falls_out_of_the_ratios():
    baseline = np.array([10.0, 5.0, 8.0])
    assert ratios(baseline / 2, baseline) == pytest.approx([0.5, 0.5, 0.5])
    assert ratios([1.0, 2.0], [2.0, 0.0]) == [0.5]
