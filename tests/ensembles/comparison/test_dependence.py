import numpy as np
import pytest

from ensemble_server.ensembles.comparison.dependence import Dependence, design_effect, lag_correlation, of_neighbours
from ensemble_server.ensembles.comparison.paired import compare_bits_per_byte, compare_right_wrong


def neighbours(rng: np.random.Generator, num: int, lag: float) -> np.ndarray:
    values = rng.standard_normal(num)
    for index in range(1, num):
        values[index] = lag * values[index - 1] + np.sqrt(1 - lag**2) * values[index]
    return values


def test_the_lag_is_found_without_the_bias_of_few_items():
    rng = np.random.default_rng(0)
    found = [lag_correlation(neighbours(rng, 20, 0.4)) for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.4, abs=0.03)


def test_few_or_equal_values_have_no_lag():
    assert lag_correlation(np.arange(5.0)) is None
    assert lag_correlation(np.full(20, 0.1)) is None
    assert of_neighbours(np.full(20, 0.1)) == Dependence(20, 1.0, None)


def test_values_that_turn_at_every_step_are_not_taken_for_more_than_they_are():
    found = of_neighbours(np.array([1.0, -1.0] * 10))
    assert found.lag < -0.9
    assert (found.effective_units, found.interval_factor(0.95)) == (20, 1.0)


def test_copies_count_once():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=400), 5)
    assert design_effect(values, [n // 5 for n in range(2000)]) == pytest.approx(5, rel=0.02)
    assert design_effect(rng.normal(size=2000), [n // 5 for n in range(2000)]) == pytest.approx(1, abs=0.15)
    assert design_effect(np.zeros(20), [n // 5 for n in range(20)]) == 5, "nothing seen, so nothing gained"


def test_intervals_of_neighbours_hold_the_truth_nearly_as_often_as_they_say():
    """400 simulated texts of 20 documents at a lag of 0.4: 80% if they are taken for independent, 93% of 4000 here."""
    rng = np.random.default_rng(2)
    size = np.full(20, 1000.0)
    hits = naive = 0
    for _ in range(400):
        nats = 1000 + neighbours(rng, 20, 0.4)
        baseline = np.full(20, 1000.0)
        hits += 0 in compare_bits_per_byte(nats, size, baseline, size, are_neighbours=True).difference.interval
        naive += 0 in compare_bits_per_byte(nats, size, baseline, size).difference.interval
    assert hits / 400 >= 0.95 - 0.04
    assert naive / 400 <= 0.86


def test_questions_on_one_passage_do_not_make_false_verdicts():
    """60 comparisons of equals, 20 passages of 10 questions whose answers go together."""
    rng = np.random.default_rng(3)
    clusters = [n // 10 for n in range(200)]
    counted = {"with": 0, "without": 0}
    for _ in range(60):
        model, baseline = (np.repeat(rng.random(20) < 0.5, 10) ^ (rng.random(200) < 0.1) for _ in range(2))
        found = compare_right_wrong(model * 1.0, baseline * 1.0, clusters=clusters, num_resamples=100)
        counted["with"] += found.p_value <= 0.05 and 0 not in found.difference.interval
        counted["without"] += compare_right_wrong(model * 1.0, baseline * 1.0, num_resamples=100).p_value <= 0.05
    assert counted["with"] / 60 <= 0.05 + 0.085
    assert counted["without"] / 60 > 0.3
