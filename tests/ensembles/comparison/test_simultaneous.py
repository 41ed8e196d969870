"""The best of several against the best of others: the level holds where all are equal, and costs little."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.special import stdtrit

from ensemble_server.ensembles.comparison.simultaneous import simultaneous_level

NUM_ITEMS = 30
NUM_TRIALS = 1500


def best_against_best(rng: np.random.Generator, *, pays: bool) -> bool:
    """Whether the interval of the best of 8 less a ninth leaves out zero; all nine are equal."""
    hard = rng.normal(0, 1, NUM_ITEMS)  # what makes an item hard for all
    arms = hard + rng.normal(0, 0.3, (9, NUM_ITEMS))
    influences = (arms - arms.mean(axis=1, keepdims=True)) / NUM_ITEMS
    ours, theirs = range(8), range(8, 9)
    level = 0.95
    if pays:
        pairs = np.array([influences[one] - influences[other] for one, other in product(ours, theirs)])
        level = simultaneous_level(pairs, level=0.95, freedom=NUM_ITEMS - 1, num_draws=2000)
    means = arms.mean(axis=1)
    best, other = min(ours, key=lambda arm: means[arm]), min(theirs, key=lambda arm: means[arm])
    gaps = arms[best] - arms[other]
    half = stdtrit(NUM_ITEMS - 1, (1 + level) / 2) * gaps.std(ddof=1) / NUM_ITEMS**0.5
    return abs(gaps.mean()) > half


@pytest.mark.slow
def test_equal_arms_part_in_no_more_trials_than_alpha_allows():
    rng = np.random.default_rng(1)
    found = np.mean([best_against_best(rng, pays=True) for _ in range(NUM_TRIALS)])
    assert found < 0.05 + 2 * (0.05 * 0.95 / NUM_TRIALS) ** 0.5
    rng = np.random.default_rng(1)
    assert np.mean([best_against_best(rng, pays=False) for _ in range(NUM_TRIALS)]) > 0.1, (
        "else there is nothing to pay"
    )


@pytest.mark.slow
def test_the_worst_choice_parts_just_as_often_as_alpha_says():
    """Over all pairs, whichever is picked: that is what the level is made for, and it is not far below it."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(NUM_TRIALS):
        arms = rng.normal(0, 1, (6, NUM_ITEMS))
        influences = (arms - arms.mean(axis=1, keepdims=True)) / NUM_ITEMS
        pairs = list(product(range(3), range(3, 6)))
        level = simultaneous_level(
            np.array([influences[one] - influences[other] for one, other in pairs]),
            level=0.95,
            freedom=NUM_ITEMS - 1,
            num_draws=2000,
        )
        tail = stdtrit(NUM_ITEMS - 1, (1 + level) / 2)
        gaps = np.array([arms[one] - arms[other] for one, other in pairs])
        hits += bool((np.abs(gaps.mean(axis=1)) > tail * gaps.std(axis=1, ddof=1) / NUM_ITEMS**0.5).any())
    assert 0.03 < hits / NUM_TRIALS < 0.068


def test_one_pair_costs_nothing_and_arms_that_go_together_cost_little():
    rng = np.random.default_rng(0)
    one = rng.normal(0, 1, 50)
    assert simultaneous_level(one[None], level=0.95, freedom=49) == 0.95
    alike = np.array([one, one + 1e-3 * rng.normal(0, 1, 50), 2 * one])
    assert simultaneous_level(alike, level=0.95, freedom=49) == pytest.approx(0.95, abs=0.005)
    apart = np.eye(50)[:10] - 1 / 50
    assert 0.99 < simultaneous_level(apart, level=0.95, freedom=49) <= 1 - 0.05 / 10


def test_pairs_that_agree_everywhere_are_corrected_as_bonferroni_does():
    assert simultaneous_level(np.zeros((4, 9)), level=0.95, freedom=8) == pytest.approx(1 - 0.05 / 4)
