from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.comparison.pass_at_k import pass_at_k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(case):
    num_samples, num_right, k = case
    subsets = list(combinations(range(num_samples), k))
    expected = sum(any(sample < num_right for sample in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


def test_large_numbers_do_not_overflow():
    assert pass_at_k(2000, 3, 100) == pytest.approx(1 - comb(1997, 100) / comb(2000, 100))


def test_one_of_one_is_accuracy():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)


@pytest.mark.parametrize("case", [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1)])
def test_cases_that_cannot_be_are_refused(case):
    with pytest.raises(ValueError, match=r"k must be|cannot be right"):
        pass_at_k(*case)
