import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ensemble_server.ensembles.comparison.significance import holm, mcnemar, sign_flip


def answers(both: int, only_model: int, only_baseline: int, neither: int):
    model = [True] * (both + only_model) + [False] * (only_baseline + neither)
    baseline = [True] * both + [False] * only_model + [True] * only_baseline + [False] * neither
    return np.array(model), np.array(baseline)


def test_mcnemar_by_hand():
    # 1 against 5 of 6 items: 2 * (C(6,0) + C(6,1)) / 2^6 = 14 / 64
    counts = mcnemar(*answers(10, 1, 5, 3))
    assert (counts.only_model, counts.only_baseline) == (1, 5)
    assert counts.p_value == pytest.approx(14 / 64)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9))
def test_mcnemar_looks_only_at_items_that_divide_the_models(only_model, only_baseline, agreed):
    plain = mcnemar(*answers(0, only_model, only_baseline, 1))
    padded = mcnemar(*answers(agreed, only_model, only_baseline, agreed))
    turned = mcnemar(*reversed(answers(0, only_model, only_baseline, 1)))
    assert plain.p_value == padded.p_value == pytest.approx(turned.p_value)
    if only_model + only_baseline:
        expected = stats.binomtest(only_model, only_model + only_baseline).pvalue
        assert plain.p_value == pytest.approx(expected)
    else:
        assert plain.p_value == 1


def test_sign_flip_by_hand():
    # of the 8 sign patterns of (1, 2, 3) only two reach a sum of 6 in size
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12))
def test_exact_sign_flip_agrees_with_scipy(differences):
    values = np.array(differences, dtype=float)
    if np.count_nonzero(values) < 2:
        return
    kept = values[values != 0]
    expected = stats.permutation_test(
        (kept,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert sign_flip(values) == pytest.approx(min(1.0, expected))


def test_drawn_flips_are_near_the_exact_answer_and_never_zero():
    values = np.random.default_rng(0).normal(0.3, 1, size=60)
    assert sign_flip(values, seed=1) == sign_flip(values, seed=1)
    assert sign_flip(values, num_flips=100_000) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)
    assert sign_flip(np.ones(200), num_flips=999) == 1 / 1000


def test_no_difference_is_no_evidence():
    assert sign_flip(np.zeros(5)) == 1


def test_p_values_of_equal_models_are_below_five_percent_five_percent_of_the_time():
    """300 simulated null comparisons of 40 items; 5% ± 3.8% is three standard errors."""
    rng = np.random.default_rng(7)
    hits = sum(sign_flip(rng.standard_t(4, size=40), seed=n, num_flips=500) <= 0.05 for n in range(300))
    assert 0.012 <= hits / 300 <= 0.088


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    turned = holm(p_values[::-1])[::-1]
    assert adjusted == pytest.approx(turned)
    # Against Bonferroni: at most as strict, and equal for the smallest.
    assert min(adjusted) == pytest.approx(min(1.0, min(p_values) * len(p_values)))
