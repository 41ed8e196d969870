from __future__ import annotations

from itertools import product

import numpy as np

from ensemble_server.server.deltas.water_filling import worth_their_bytes


def test_parts_are_taken_by_what_they_take_away_per_byte() -> None:
    gains, costs = np.array([9.0, 4.0, 8.0, 1.0]), np.array([3, 1, 4, 1])  # per byte: 3, 4, 2, 1
    assert worth_their_bytes(gains, costs, 4).tolist() == [True, True, False, False]
    assert worth_their_bytes(gains, costs, 8).tolist() == [True, True, True, False]
    assert not worth_their_bytes(gains, costs, 0.5).any()


def test_no_choice_of_equal_cost_leaves_less_error() -> None:
    gains, costs = np.random.default_rng(0).exponential(size=10), np.full(10, 7)
    taken = worth_their_bytes(gains, costs, 30)
    choices = [np.array(choice, dtype=bool) for choice in product([0, 1], repeat=10)]
    assert gains[taken].sum() == max(gains[choice].sum() for choice in choices if costs[choice].sum() <= 30)


def test_equal_parts_are_taken_in_their_order() -> None:
    assert worth_their_bytes(np.ones(4), np.ones(4), 2).tolist() == [True, True, False, False]
