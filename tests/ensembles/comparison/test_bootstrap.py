import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.intervals import Interval

VALUES = arrays(np.float64, st.integers(10, 40), elements=st.floats(-100, 100, width=16))
FEW = {"num_resamples": 300}


def expanded(num_items: int) -> float:
    """The level at which a plain bootstrap has the tails of our 95%: Student's t, and a resample's smaller spread."""
    return 1 - 2 * stats.norm.sf(stats.t.ppf(0.975, num_items - 1) * np.sqrt(num_items / (num_items - 1)))


@given(VALUES, st.integers(0, 5))
def test_the_same_seed_gives_the_same_numbers(values, seed):
    assert bootstrap.mean(values, seed=seed, **FEW) == bootstrap.mean(values, seed=seed, **FEW)


@given(VALUES, st.floats(0.5, 8), st.floats(-50, 50))
def test_intervals_scale_and_shift_with_the_figures(values, scale, shift):
    plain = bootstrap.mean(values, **FEW)
    moved = bootstrap.mean(values * scale + shift, **FEW)
    if plain.interval.method == moved.interval.method:  # rounding can make equal resamples differ
        assert moved.value == pytest.approx(plain.value * scale + shift, abs=1e-9)
        assert moved.standard_error == pytest.approx(plain.standard_error * scale, rel=1e-6, abs=1e-9)


@given(VALUES)
def test_the_difference_of_a_model_to_itself_is_zero_and_certain(values):
    estimate = bootstrap.ratio_difference(values, np.ones(len(values)), values, np.ones(len(values)), **FEW)
    assert (estimate.value, estimate.interval, estimate.standard_error) == (0, Interval(0, 0, 0.95, "percentile"), 0)


@given(VALUES)
def test_an_interval_lies_among_the_items(values):
    interval = bootstrap.mean(values, **FEW).interval
    slack = 1e-9 * np.abs(values).max() + 1e-12
    assert values.min() - slack <= interval.low <= interval.high <= values.max() + slack


def test_bca_agrees_with_scipys():
    values = np.random.default_rng(3).exponential(size=60)
    estimate = bootstrap.mean(values, num_resamples=100_000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=100_000, batch=5000, method="BCa", rng=4, confidence_level=expanded(60)
    )
    assert estimate.interval.method == "bca"
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx(
        tuple(expected.confidence_interval), abs=0.006
    )
    assert estimate.standard_error == pytest.approx(expected.standard_error, rel=0.01)


def test_bca_of_a_ratio_agrees_with_scipys():
    rng = np.random.default_rng(5)
    sizes = rng.integers(50, 2000, size=30).astype(float)
    costs = sizes * rng.gamma(3, 0.4, size=30)
    estimate = bootstrap.ratio(costs, sizes, num_resamples=100_000)
    expected = stats.bootstrap(
        (costs, sizes),
        lambda c, s, axis=-1: c.sum(axis=axis) / s.sum(axis=axis),
        paired=True,
        n_resamples=100_000,
        batch=5000,
        method="BCa",
        rng=4,
        confidence_level=expanded(30),
    )
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx(
        tuple(expected.confidence_interval), rel=0.005
    )


def test_percentile_interval_where_bca_does_not_apply():
    few = bootstrap.mean(np.arange(9.0))
    assert few.interval.method == "percentile"
    assert bootstrap.mean(np.arange(10.0)).interval.method == "bca"
    assert bootstrap.mean(np.full(20, 0.1)).interval == Interval(
        pytest.approx(0.1), pytest.approx(0.1), 0.95, "percentile"
    )


def test_one_item_has_no_interval():
    estimate = bootstrap.mean(np.array([3.0]))
    assert (estimate.value, estimate.interval, estimate.standard_error, estimate.num_units) == (3.0, None, None, 1)


def test_a_ratio_weighs_documents_by_their_length():
    assert bootstrap.ratio(np.array([10.0, 1.0]), np.array([5.0, 1.0])).value == pytest.approx(11 / 6)


def test_samples_are_averaged_within_their_item():
    per_sample = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, np.nan]])
    assert bootstrap.mean(per_sample, **FEW) == bootstrap.mean(np.array([0.5, 1.0, 0.0]), **FEW)


def test_copies_of_items_in_one_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(size=30)
    copied, cluster = np.repeat(values, 5), np.repeat(np.arange(30), 5)
    plain, clustered = bootstrap.mean(values), bootstrap.mean(copied, clusters=list(cluster))
    assert clustered.num_units == 30
    assert clustered.interval.low == pytest.approx(plain.interval.low)
    assert clustered.standard_error == pytest.approx(plain.standard_error)
    assert bootstrap.mean(copied).standard_error < plain.standard_error / 1.8


def test_domains_count_alike_whatever_their_sizes():
    small = (np.array([1.0, 3.0]), np.ones(2))
    large = (np.full(100, 10.0), np.ones(100))
    estimate = bootstrap.macro_ratio([small, large])
    assert estimate.value == pytest.approx((2 + 10) / 2)
    assert estimate.interval.low == pytest.approx((1 + 10) / 2)  # only the small domain varies: 1,1 or 1,3 or 3,3
    assert estimate.interval.high == pytest.approx((3 + 10) / 2)


def test_one_domain_is_no_macro_mean():
    rng = np.random.default_rng(1)
    costs, sizes = rng.exponential(size=20), rng.uniform(1, 2, size=20)
    assert bootstrap.macro_ratio([(costs, sizes)]) == bootstrap.ratio(costs, sizes)


def test_a_macro_difference_is_paired_within_domains():
    rng = np.random.default_rng(2)
    domains = []
    for _ in range(3):
        costs, sizes = rng.exponential(100, size=25), np.full(25, 50.0)
        domains.append((costs + 1, sizes, costs, sizes))
    estimate = bootstrap.macro_ratio_difference(domains)
    assert estimate.value == pytest.approx(1 / 50)
    assert estimate.standard_error == pytest.approx(0, abs=1e-12)


def test_quantiles_have_an_interval():
    values = np.random.default_rng(0).exponential(size=200)
    estimate = bootstrap.quantile(values, 0.95)
    assert estimate.value == np.quantile(values, 0.95)
    assert estimate.interval.low < estimate.value < estimate.interval.high
    assert estimate.interval.method == "percentile"
    assert bootstrap.quantile(np.array([2.0])).interval is None


@pytest.mark.parametrize("draw", ["right_or_wrong", "skewed_ratio"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(draw):
    """400 simulated comparisons of 60 items; 95% ± 3.3% is three standard errors of such a count."""
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(400):
        if draw == "right_or_wrong":
            difference = (rng.random(60) < 0.6) * 1.0 - (rng.random(60) < 0.45)
            truth, estimate = 0.15, bootstrap.mean(difference, num_resamples=1000)
        else:
            sizes = rng.integers(200, 3000, size=60).astype(float)
            costs = sizes * rng.gamma(4, 0.25, size=60)
            truth, estimate = 1.0, bootstrap.ratio(costs, sizes, num_resamples=1000)
        hits += truth in estimate.interval
    assert 0.95 - 0.033 <= hits / 400 <= 0.95 + 0.033
