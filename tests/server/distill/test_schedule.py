from __future__ import annotations

from itertools import chain, islice

import pytest

from ensemble_server.server.distill.schedule import batches_of, learning_rate_factor, steps_in_time


def test_the_rate_rises_for_a_tenth_and_falls_along_a_cosine() -> None:
    factors = [learning_rate_factor(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[11] == pytest.approx(0.5)  # half of the way down
    assert factors[-1] < 0.01
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_one_step_is_made_at_the_full_rate() -> None:
    assert learning_rate_factor(0, 1) == 1


def test_steps_fit_into_the_time_that_is_left() -> None:
    assert steps_in_time(10, 100, seconds=20, budget_s=60) == 30  # two seconds a step
    assert steps_in_time(10, 15, seconds=20, budget_s=60) == 15  # never more than were planned
    assert steps_in_time(10, 100, seconds=70, budget_s=60) == 10  # it is over


def test_every_item_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    batches = list(islice(batches_of(10, 4, seed=1), 6))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*batches[:3])) == sorted(chain(*batches[3:])) == list(range(10))
    assert batches == list(islice(batches_of(10, 4, seed=1), 6))
    assert batches != list(islice(batches_of(10, 4, seed=2), 6))
