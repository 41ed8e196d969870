import math

import numpy as np
import pytest
from scipy import stats

from ensemble_server.ensembles.comparison.paired import compare_right_wrong
from ensemble_server.ensembles.comparison.power import (
    OfClusters,
    OfMean,
    OfRightWrong,
    effect_of_units,
    items_for_any_verdict,
    items_for_difference,
    items_for_equivalence,
    mcnemar_power,
    units_for_effect,
)
from ensemble_server.ensembles.comparison.significance import holm, mcnemar


@pytest.mark.parametrize(("num_items", "shares", "alpha"), [(20, (0.4, 0.1), 0.05), (60, (0.3, 0.1), 0.0025)])
def test_the_power_of_mcnemars_test_is_the_sum_over_all_outcomes(num_items, shares, alpha):
    counts = np.array(
        [(model, other) for model in range(num_items + 1) for other in range(num_items + 1 - model) if model or other]
    )
    is_significant = 2 * stats.binom.cdf(counts.min(axis=1), counts.sum(axis=1), 0.5) <= alpha
    rest = num_items - counts.sum(axis=1)
    chances = stats.multinomial.pmf(np.column_stack([counts, rest]), num_items, [*shares, 1 - sum(shares)])
    expected = chances[is_significant].sum()
    assert mcnemar_power(num_items, *shares, alpha) == pytest.approx(expected, abs=1e-9)


def test_a_detectable_difference_is_detected_four_times_in_five_after_holms_correction():
    """300 families of 20 comparisons on 200 items, one of them with the difference that is called detectable."""
    rng = np.random.default_rng(0)
    gain = OfRightWrong(200, 40).detectable(alpha=0.05, num_comparisons=20)
    found = 0
    for _ in range(300):
        kinds = rng.choice(3, size=(20, 200), p=[0.1, 0.1, 0.8])
        divided = max(0.2, gain)
        kinds[0] = rng.choice(3, size=200, p=[(divided + gain) / 2, (divided - gain) / 2, 1 - divided])
        found += holm([mcnemar(row == 0, row == 1).p_value for row in kinds])[0] <= 0.05
    assert 0.8 - 0.07 <= found / 300 <= 0.8 + 0.12  # three standard errors; the share that divides is rounded up


def test_what_a_mean_can_show_with_few_units_agrees_with_students_noncentral_distribution():
    for freedom, comparisons in ((4, 1), (9, 20), (200, 5)):
        effect = OfMean(1.0, freedom).detectable(alpha=0.05, num_comparisons=comparisons)
        threshold = stats.t.ppf(1 - 0.025 / comparisons, freedom)
        assert stats.nct.sf(threshold, freedom, effect) == pytest.approx(0.8, abs=1e-4)


def test_for_very_many_items_it_is_the_usual_two_point_eight_standard_errors():
    assert OfMean(0.1, 1e9).detectable(alpha=0.05) == pytest.approx(0.28016, rel=1e-4)


def test_what_cannot_be_found_has_no_size():
    assert OfRightWrong(5, 0).detectable(alpha=0.05) is None
    assert OfRightWrong(9, 3).detectable(alpha=0.05, num_comparisons=20) is None
    assert OfMean(1.0, 3, smallest_p=0.125).detectable(alpha=0.05) is None


def test_items_that_a_verdict_needs():
    # 2 / 2^n: 6 questions for one arm (0.031), 10 for twenty (20 * 0.00195 = 0.039)
    assert (items_for_any_verdict(1, alpha=0.05), items_for_any_verdict(20, alpha=0.05)) == (6, 10)
    for num_comparisons in (1, 3, 20, 200):
        needed = items_for_any_verdict(num_comparisons, alpha=0.05)
        assert num_comparisons * 2 / 2**needed <= 0.05 < num_comparisons * 2 / 2 ** (needed - 1)
    needed = items_for_equivalence(0.02, alpha=0.05)
    for num_items, is_within in ((needed, True), (needed - 1, False)):
        interval = compare_right_wrong(np.ones(num_items), np.ones(num_items), num_resamples=100).difference.interval
        assert (interval.high <= 0.02) == is_within
    assert items_for_equivalence(0, alpha=0.05) is None


def test_planned_items_show_what_they_were_planned_for():
    needed = items_for_difference(0.1, 0.3, 5, alpha=0.05)
    assert mcnemar_power(needed, 0.2, 0.1, 0.01) >= 0.8 > mcnemar_power(needed // 2, 0.2, 0.1, 0.01)


def test_documents_and_effects_are_two_views_of_one_curve():
    needed = units_for_effect(1.0, 20, alpha=0.05)
    assert effect_of_units(needed, 20, alpha=0.05) <= 1.0 < effect_of_units(needed - 1, 20, alpha=0.05)
    assert effect_of_units(1, 20, alpha=0.05) is None
    assert math.isfinite(effect_of_units(6, 200, alpha=0.05))


def test_clusters_show_no_more_than_their_number_allows():
    items = OfRightWrong(200, 40)
    assert OfClusters(OfMean(0.001, 3, smallest_p=0.125), items).detectable(alpha=0.05) is None
    alike = OfClusters(OfMean(0.0, 19, smallest_p=2**-19), items)
    assert alike.detectable(alpha=0.05) == items.detectable(alpha=0.05), "clusters that are alike by chance"
