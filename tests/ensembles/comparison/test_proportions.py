import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from ensemble_server.ensembles.comparison.proportions import tango, wilson


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_wilson_agrees_with_scipy(counts, level):
    right, items = counts
    expected = binomtest(right, items).proportion_ci(level, method="wilson")
    interval = wilson(right, items, level=level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert right / items in interval


@pytest.mark.parametrize("counts", [(1, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(ValueError, match="needs 0 <= num_right"):
        wilson(*counts)


def score_by_search(only_model: int, only_baseline: int, num_items: int, difference: float) -> float:
    """Tango's statistic, the other parameter found by search: that at which the counts are likeliest."""
    rest = num_items - only_model - only_baseline

    def loss(of_baseline: float) -> float:
        shares = (of_baseline + difference, of_baseline, 1 - 2 * of_baseline - difference)
        counts = (only_model, only_baseline, rest)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    of_baseline = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x)
    variance = num_items * (2 * of_baseline + difference - difference**2)
    return (only_model - only_baseline - num_items * difference) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [(12, 2, 50), (5, 1, 10), (3, 9, 32), (30, 28, 400)])
def test_the_ends_of_tangos_interval_are_where_the_score_test_rejects(counts):
    z = float(norm.isf(0.025))
    interval = tango(*counts)
    assert score_by_search(*counts, interval.low) == pytest.approx(z, abs=1e-4)
    assert score_by_search(*counts, interval.high) == pytest.approx(-z, abs=1e-4)


def test_items_answered_alike_leave_room_for_a_difference():
    # without an item that divides the two: d n / sqrt(n d (1 - d)) = z, so d = z^2 / (n + z^2)
    square = float(norm.isf(0.025)) ** 2
    for num_items in (6, 20, 200):
        interval = tango(0, 0, num_items)
        assert (interval.low, interval.high) == pytest.approx(
            (-square / (num_items + square), square / (num_items + square))
        )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60), st.sampled_from([0.9, 0.95, 0.99]))
def test_tangos_interval_turns_with_the_pair_and_holds_what_was_found(only_model, only_baseline, alike, level):
    num_items = only_model + only_baseline + alike
    forth, back = (
        tango(*pair, num_items, level=level) for pair in ((only_model, only_baseline), (only_baseline, only_model))
    )
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert -1 <= forth.low <= (only_model - only_baseline) / num_items <= forth.high <= 1


def test_the_ends_of_the_scale_are_reached_when_all_items_say_so():
    assert tango(7, 0, 7).high == 1
    assert tango(0, 7, 7).low == -1


@pytest.mark.parametrize("counts", [(1, 0, 0), (-1, 0, 5), (4, 3, 6)])
def test_divided_items_that_cannot_be_are_refused(counts):
    with pytest.raises(ValueError, match="no more that divide the models"):
        tango(*counts)


def test_with_few_clusters_the_tails_are_students_and_finite() -> None:
    wide = wilson(20, 40, freedom=1)  # z is 12.7, whose normal tail is no float
    z = 12.7062
    half = z * (0.25 / 40 + z * z / (4 * 40**2)) ** 0.5 / (1 + z * z / 40)
    assert (wide.low, wide.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5) and wide.level == 0.95
    assert tango(0, 0, 6, freedom=1).high == pytest.approx(z * z / (6 + z * z), abs=1e-5)
