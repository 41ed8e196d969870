import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ensemble_server.ensembles.comparison.proportions import wilson


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
