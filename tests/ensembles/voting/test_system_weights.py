from __future__ import annotations

import math

import numpy as np
import pytest

from ensemble_server.ensembles.voting.system_weights import (
    AnsweredRow,
    accuracies,
    cross_validated,
    fitted_weights,
)


def rows_of(right: dict[str, list[bool]], *, spread: int = 7, seed: int = 0) -> list[AnsweredRow]:
    """A row for each place: a system that is right says "r", else one of `spread` wrong answers."""
    rng = np.random.default_rng(seed)
    number = len(next(iter(right.values())))
    return [
        AnsweredRow(
            [(name, "r" if is_right[k] else f"w{rng.integers(spread)}") for name, is_right in right.items()], "r"
        )
        for k in range(number)
    ]


def simulated(shares: list[float], number: int, seed: int) -> list[AnsweredRow]:
    rng = np.random.default_rng(seed)
    return rows_of({f"s{k}": list(rng.random(number) < share) for k, share in enumerate(shares)}, seed=seed)


def test_accuracy_is_drawn_towards_a_half() -> None:
    rows = rows_of({"ann": [True, True, False], "bob": [False, False, False]})
    assert accuracies(rows) == {"ann": 3 / 5, "bob": 1 / 5}


def test_log_odds_of_systems_that_err_in_one_way() -> None:
    """By hand: (9 + 1) / 12 and (7 + 1) / 12 right are odds of 5 and 2, so ann outvotes bob and cas together.

    Alike, the majority is right in 7 of 10 rows; under the log-odds in the 9 where ann is.
    """
    ann, others = [True] * 9 + [False], [False] * 3 + [True] * 7
    weights = fitted_weights(rows_of({"ann": ann, "bob": others, "cas": others}, spread=1))
    assert weights == pytest.approx({"ann": math.log(5), "bob": math.log(2), "cas": math.log(2)})


def test_a_system_that_is_mostly_wrong_loses_its_vote() -> None:
    weights = fitted_weights(simulated([0.7, 0.65, 0.02, 0.02, 0.02], 400, seed=1))
    assert max(weights["s2"], weights["s3"], weights["s4"]) < 0.35 * weights["s0"]


def test_fitted_weights_gain_on_rows_that_they_were_not_fitted_to() -> None:
    gains = []
    for seed in range(5):
        worth = cross_validated(simulated([0.7, 0.6, 0.5, 0.2, 0.15, 0.1, 0.1], 300, seed=seed), seed=seed)
        assert 0 <= worth.best <= 1
        gains.append(worth.fitted - worth.alike)
    assert np.mean(gains) > 0.02


def test_weights_of_a_row_do_not_know_its_answer() -> None:
    rows = simulated([0.6, 0.5, 0.4], 50, seed=3)
    worth = cross_validated(rows, num_folds=5, seed=1)
    changed = [*rows[:7], AnsweredRow(rows[7].answers, "something else"), *rows[8:]]
    assert cross_validated(changed, num_folds=5, seed=1).fold_weights[7] == worth.fold_weights[7]


def test_own_weights_of_votes_count() -> None:
    row = AnsweredRow([("a", "x"), ("b", "y")], "y", weights=[1.0, 2.0])
    assert row.is_won({"a": 1.0, "b": 1.0})
    assert not row.is_won({"a": 3.0, "b": 1.0})
    assert not AnsweredRow([("a", "y")], "y").is_won({"a": 0.0})


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 rows whose answer is known, got 2"):
        cross_validated(simulated([0.5], 2, seed=0))
