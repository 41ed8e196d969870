from __future__ import annotations

import numpy as np
import pytest

from ensemble_server.server.engines.transformers_engine.step_costs import FORGOTTEN_AFTER, StepCosts


def costs_of(*forwards: tuple[int, float]) -> StepCosts:
    costs = StepCosts()
    for num_tokens, seconds in forwards:
        costs.observe(num_tokens, seconds)
    return costs


def at(costs: StepCosts, num_tokens: int) -> float:
    return float(costs.seconds(np.array([num_tokens]))[0])


def test_what_was_seen_is_told():
    costs = costs_of((1, 0.1), (8, 0.3), (512, 4.0))
    assert at(costs, 1) == pytest.approx(0.1)
    assert at(costs, 8) == pytest.approx(0.3)


def test_between_two_points_it_goes_straight():
    assert at(costs_of((2, 0.2), (6, 0.4)), 4) == pytest.approx(0.3)


def test_a_further_token_is_cheap_until_it_was_tried():
    costs = costs_of((4, 1.0))
    assert 1.0 < at(costs, 8) < 1.3
    assert 0.8 < at(costs, 1) < 1.0


def test_more_tokens_never_take_less_time():
    costs = costs_of((1, 0.2), (4, 0.1), (16, 0.3))
    assert (np.diff(costs.seconds(np.arange(1, 40))) >= 0).all()


def test_one_forward_that_was_disturbed_moves_little():
    costs = costs_of(*[(1, 0.1)] * 20, (1, 10.0))
    assert at(costs, 1) < 0.13


def test_a_machine_that_becomes_slower_does_so_for_all_numbers_of_tokens():
    costs = costs_of(*[(1, 0.1), (8, 0.2)] * 10)
    for _ in range(60):
        costs.observe(1, 0.2)
    assert at(costs, 1) == pytest.approx(0.2, rel=0.05)
    assert at(costs, 8) > 0.25


def test_what_was_not_seen_for_long_is_forgotten():
    costs = costs_of((8, 100.0), *[(1, 0.1)] * (2 * FORGOTTEN_AFTER))
    assert at(costs, 8) < 0.2
