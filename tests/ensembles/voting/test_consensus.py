from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ensemble_server.ensembles.voting.consensus import elect, equal_texts
from ensemble_server.ensembles.voting.similarity import rouge_l

UNIT = st.floats(0, 1, width=32)


def symmetric(size: int) -> st.SearchStrategy[np.ndarray]:
    def with_ones(matrix: np.ndarray) -> np.ndarray:
        matrix = np.triu(matrix, 1)
        return matrix + matrix.T + np.eye(size)

    return arrays(np.float64, (size, size), elements=UNIT).map(with_ones)


MATRICES = st.integers(1, 6).flatmap(symmetric)


def test_scores_by_hand() -> None:
    similarity = np.array([[1, 0.5, 0.25], [0.5, 1, 0.75], [0.25, 0.75, 1]])
    result = elect(similarity)
    assert result.scores.tolist() == [0.75, 1.25, 1.0]
    assert result.ranking == (1, 2, 0)
    assert result.winner == 1
    assert result.margin == 0.25
    assert result.ties == ()


@given(MATRICES)
def test_a_score_is_the_sum_over_all_others(similarity: np.ndarray) -> None:
    result = elect(similarity)
    n = len(similarity)
    expected = [sum(similarity[i, j] for j in range(n) if j != i) for i in range(n)]
    assert result.scores == pytest.approx(expected)
    assert result.scores[result.winner] >= max(expected) - 1e-6
    assert sorted(result.ranking) == list(range(n))


@given(MATRICES, st.randoms(use_true_random=False))
def test_order_of_candidates_changes_no_score(similarity: np.ndarray, random: object) -> None:
    order = list(range(len(similarity)))
    random.shuffle(order)
    assert elect(similarity[np.ix_(order, order)]).scores == pytest.approx(elect(similarity).scores[order])


def test_ties_within_the_tolerance_go_to_the_first() -> None:
    similarity = np.array([[1, 0.5, 0.5], [0.5, 1, 0.5 + 1e-9], [0.5, 0.5 + 1e-9, 1]])
    result = elect(similarity)
    assert result.scores[0] < result.scores[1]
    assert result.winner == 0
    assert result.ties == ((0, 1, 2),)
    assert result.margin == 0


def test_ties_below_the_first_place_are_reported_after_the_better_ones() -> None:
    scores_by_voter = np.array([[1, 0.9, 0.5, 0.5], [0.9, 1, 0.5, 0.5], [0.5, 0.5, 1, 0.0], [0.5, 0.5, 0.0, 1]])
    assert elect(scores_by_voter).ties == ((0, 1), (2, 3))


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_weight_is_as_good_as_being_listed_that_often(first: int, second: int) -> None:
    texts = ["a b c d", "a b x y", "p q a b", "c d e"]
    weights = [first, second, 1, 1]
    repeated = [text for text, weight in zip(texts, weights, strict=True) for _ in range(weight)]
    weighted, listed = elect(rouge_l("rouge_l_word", texts), weights), elect(rouge_l("rouge_l_word", repeated))
    assert texts[weighted.winner] == repeated[listed.winner]
    for text, score in zip(texts, weighted.scores, strict=True):
        assert score == pytest.approx(listed.scores[repeated.index(text)])


@given(MATRICES, st.floats(0.5, 8))
def test_a_common_factor_of_the_weights_only_scales_the_scores(similarity: np.ndarray, factor: float) -> None:
    assert elect(similarity, [factor] * len(similarity)).scores == pytest.approx(factor * elect(similarity).scores)


def test_asymmetric_rows_are_candidates_and_columns_voters() -> None:
    similarity = np.array([[1.0, 0.9], [0.1, 1.0]])
    assert elect(similarity).scores.tolist() == [0.9, 0.1]


def test_a_lone_candidate_wins_without_a_margin() -> None:
    result = elect(np.ones((1, 1)))
    assert (result.winner, result.margin, result.scores.tolist(), result.ties) == (0, 0.0, [0.0], ())


def test_outliers_leave_the_vote() -> None:
    # 3 is far from all; its small leaning to 0 would otherwise elect 0 before 1
    similarity = np.array([[1, 0.6, 0.6, 0.2], [0.6, 1, 0.65, 0], [0.6, 0.65, 1, 0], [0.2, 0, 0, 1]])
    assert elect(similarity).winner == 0
    pruned = elect(similarity, prune=0.5)
    assert pruned.outliers == (3,)
    assert pruned.scores[:3] == pytest.approx([1.2, 1.25, 1.25])
    assert pruned.winner == 1
    assert pruned.ranking == (1, 2, 0, 3)
    assert pruned.ties == ((1, 2),)


@given(MATRICES, UNIT)
def test_pruning_never_takes_the_best(similarity: np.ndarray, prune: float) -> None:
    best = elect(similarity).winner
    assert best not in elect(similarity, prune=prune).outliers


def test_pruning_all_but_one_leaves_it_the_winner() -> None:
    similarity = np.array([[1, 0.5, 0.1], [0.4, 1, 0.0], [0.0, 0.0, 1]])
    result = elect(similarity, prune=1.0)
    assert result.outliers == (2,)
    assert result.winner == 0


def test_classes_of_equal_texts() -> None:
    assert equal_texts(["b", "a", "b", ""]) == [[0, 2], [1], [3]]
