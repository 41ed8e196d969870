import math

import numpy as np
import pytest

from ensemble_server.ensembles.comparison.paired import compare_bits_per_byte, compare_right_wrong, compare_scores
from ensemble_server.ensembles.comparison.proportions import tango
from ensemble_server.ensembles.comparison.significance import McNemar


def test_right_and_wrong_by_hand():
    model = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    baseline = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0, 1])
    found = compare_right_wrong(model, baseline)
    assert found.difference.value == pytest.approx(0.4)
    assert found.mcnemar == McNemar(5, 1, pytest.approx(14 / 64))
    assert (found.test, found.p_value) == ("mcnemar", found.mcnemar.p_value)
    assert (found.wins, found.losses, found.ties) == (5, 1, 4)
    assert found.odds == pytest.approx(5.5 / 1.5)
    assert found.effect_size == pytest.approx(2 * math.asin(math.sqrt(0.8)) - 2 * math.asin(math.sqrt(0.4)))
    assert found.difference.interval == tango(5, 1, 10)
    assert found.detectable() is not None and found.detectable(num_comparisons=100) is None


def test_right_and_wrong_takes_nothing_in_between():
    with pytest.raises(AssertionError, match="0 or 1"):
        compare_right_wrong(np.array([0.5, 1]), np.array([0, 1]))


def test_scores_are_compared_item_by_item():
    rng = np.random.default_rng(0)
    baseline = rng.normal(10, 5, size=50)  # items differ far more than models do
    found = compare_scores(baseline + rng.normal(0.5, 0.2, size=50), baseline)
    assert found.p_value < 0.001
    assert found.difference.interval.low > 0.4
    assert (found.test, found.effect_size_name) == ("sign_flip", "cohens_d_z")


def test_several_samples_are_averaged_within_their_item():
    model = np.array([[1.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    found = compare_scores(model, np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.5]]))
    assert found.difference.value == pytest.approx((0.5 + 0 - 0.25) / 3)
    assert (found.wins, found.losses, found.ties) == (1, 1, 1)


def test_turning_the_pair_turns_the_sign():
    rng = np.random.default_rng(1)
    left, right = rng.random((2, 40))
    forth, back = compare_scores(left, right), compare_scores(right, left)
    assert forth.difference.value == pytest.approx(-back.difference.value)
    assert forth.p_value == pytest.approx(back.p_value)
    assert (forth.wins, forth.losses) == (back.losses, back.wins)


def test_what_real_figures_can_show_follows_from_their_standard_error():
    rng = np.random.default_rng(0)
    found = compare_scores(rng.normal(size=2000), rng.normal(size=2000))
    assert found.detectable() == pytest.approx(2.8016 * found.difference.standard_error, rel=3e-3)
    assert found.detectable(num_comparisons=20) > 1.3 * found.detectable()


def test_bits_per_byte_weigh_documents_by_bytes_and_fewer_are_wins():
    nats = np.array([100.0, 20.0]) * math.log(2)
    baseline = np.array([110.0, 19.0]) * math.log(2)
    size = np.array([100.0, 10.0])
    found = compare_bits_per_byte(nats, size, baseline, size)
    assert found.difference.value == pytest.approx(-9 / 110)
    assert (found.wins, found.losses, found.ties) == (1, 1, 0)


def test_bits_per_byte_of_other_tokenizers_are_compared_by_their_own_bytes():
    nats, size = np.full(20, 10.0), np.full(20, 10.0)
    found = compare_bits_per_byte(nats, size, nats * 1.1, size * 1.1)
    assert found.difference.value == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1


def test_clusters_are_drawn_and_flipped_as_a_whole():
    differences = np.repeat(np.array([1.0, 2.0, 3.0]), 10)
    found = compare_scores(differences, np.zeros(30), clusters=[n // 10 for n in range(30)])
    assert found.p_value == pytest.approx(2 / 8)
    assert found.difference.num_units == 3


def test_figures_of_other_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        compare_scores(np.zeros(3), np.zeros(4))


def test_right_and_wrong_in_clusters_are_not_taken_for_independent():
    model, baseline = np.ones(30), np.zeros(30)
    assert compare_right_wrong(model, baseline).p_value == pytest.approx(2 / 2**30)
    found = compare_right_wrong(model, baseline, clusters=[n // 10 for n in range(30)])
    assert (found.test, found.p_value) == ("sign_flip", pytest.approx(2 / 8))


def test_a_document_without_scored_tokens_is_a_tie():
    nats, size = np.array([0.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.0])
    found = compare_bits_per_byte(nats, size, nats * 2, size)
    assert (found.wins, found.losses, found.ties) == (2, 0, 1)
    assert np.isfinite(found.effect_size)


def test_few_clusters_promise_nothing_and_have_long_tails():
    model, baseline = np.tile([1.0, 1.0], 100), np.tile([1.0, 0.0], 100)  # each cluster divides alike
    found = compare_right_wrong(model, baseline, clusters=[n // 50 for n in range(200)])
    assert found.detectable() is None, "2 of 2^4 patterns of signs are 0.125"
    plain = compare_right_wrong(model, baseline).difference.interval
    # 4 clusters: Student's quantile for 3 degrees of freedom is 3.182, where the normal one is 1.960
    assert (found.difference.interval.high - 0.5) / (plain.high - 0.5) == pytest.approx(3.182 / 1.960, rel=0.06)


def test_scores_that_agree_but_for_a_few_items_are_not_called_equal():
    """Six questions of which one moved by a hundredth: the others may hide as much as six that were answered alike."""
    same = np.full(6, 0.5)
    alike = compare_scores(same, same).difference.interval
    moved = compare_scores([*same[:5], 0.51], same).difference.interval
    assert moved.high > 0.3 and moved.high == pytest.approx(alike.high, abs=0.01)
    assert compare_scores(np.full(3, 0.51), np.full(3, 0.5)).difference.interval.low < 0


def test_what_differs_by_rounding_is_a_tie():
    nats, size = np.linspace(500.0, 700.0, 8), np.full(8, 1000.0)
    found = compare_bits_per_byte(nats * (1 + 1e-8), size, nats, size)
    assert (found.wins, found.losses, found.ties) == (0, 0, 8)
