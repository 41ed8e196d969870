import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit

from ensemble_server.ensembles.comparison.bradley_terry import bradley_terry, outcomes_of_scores


def test_the_strengths_are_the_likeliest_ones():
    rng = np.random.default_rng(0)
    outcomes = rng.integers(0, 2, size=(4, 4, 30)).astype(float)
    outcomes = np.triu(np.ones((4, 4)), 1)[..., None] * outcomes
    outcomes[np.tril_indices(4)] = np.nan

    def loss(theta):
        total = 0.5 * (log_expit(theta) + log_expit(-theta)).sum()
        for i in range(4):
            for j in range(i + 1, 4):
                won = outcomes[i, j].sum()
                total += won * log_expit(theta[i] - theta[j]) + (30 - won) * log_expit(theta[j] - theta[i])
        return -total

    expected = minimize(loss, np.zeros(4), tol=1e-12).x
    found = np.array([one.log_strength for one in bradley_terry(outcomes)])
    assert found == pytest.approx(expected - expected.mean(), abs=1e-5)


def test_a_model_that_wins_everything_is_strong_and_finite():
    scores = np.stack([np.ones(20), np.zeros(20)])
    strong, weak = bradley_terry(outcomes_of_scores(scores))
    assert 1 < strong.log_strength < 10 and strong.log_strength == pytest.approx(-weak.log_strength)
    assert strong.win_rate == pytest.approx(1 - weak.win_rate) and strong.win_rate > 0.9


def test_draws_are_half_a_win_for_either():
    found = bradley_terry(outcomes_of_scores(np.ones((3, 10))))
    assert [one.log_strength for one in found] == pytest.approx([0, 0, 0])
    assert [one.win_rate for one in found] == pytest.approx([0.5, 0.5, 0.5])


def test_one_item_has_no_interval_and_pairs_may_be_missing():
    outcomes = np.full((3, 3, 1), np.nan)
    outcomes[0, 1] = 1.0
    found = bradley_terry(outcomes)
    assert found[0].log_strength > found[2].log_strength > found[1].log_strength
    assert found[0].interval is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """40 simulated sets of 40 items; three standard errors of such a count are 10%."""
    rng = np.random.default_rng(3)
    truth = np.array([0.6, 0.0, -0.6])
    hits = 0
    for _ in range(40):
        outcomes = np.full((3, 3, 40), np.nan)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            outcomes[i, j] = rng.random(40) < 1 / (1 + np.exp(truth[j] - truth[i]))
        hits += truth[0] in bradley_terry(outcomes)[0].interval
    assert hits / 40 >= 0.95 - 0.104


@pytest.mark.parametrize(("num_items", "at_least"), [(5, 0.10), (100, 1.74)])
def test_a_model_that_won_everything_is_not_known_exactly(num_items, at_least):
    """n wins of n leave a chance of 0.05^(1/n) possible, with 5% to err: 0.549 of 5, 0.970 of 100."""
    strong, weak = bradley_terry(outcomes_of_scores(np.stack([np.ones(num_items), np.zeros(num_items)])))
    assert strong.interval.low <= at_least < strong.log_strength < strong.interval.high
    assert weak.interval.high == pytest.approx(-strong.interval.low)


def test_clusters_are_drawn_whole_and_rounding_is_no_win():
    scores = np.stack([np.tile([1.0, 0.0], 20), np.zeros(40)])
    alone = bradley_terry(outcomes_of_scores(scores))[0].interval
    together = bradley_terry(outcomes_of_scores(scores), clusters=[n // 10 for n in range(40)])[0].interval
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    same = np.linspace(1, 2, 12)
    found = bradley_terry(outcomes_of_scores(np.stack([same, same + 1e-9])))
    assert [one.log_strength for one in found] == pytest.approx([0, 0])
