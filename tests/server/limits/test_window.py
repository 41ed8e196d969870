from __future__ import annotations

import random

import pytest

from ensemble_server.server.limits.window import MinuteWindow


class Clock:
    now = 100.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_window_has_room_until_the_limit_is_reached_and_again_a_minute_later(clock):
    window = MinuteWindow(2, clock)
    for remaining in (1, 0):
        assert window.wait_s() == 0
        window.add(1)
        assert window.remaining == remaining
    assert window.wait_s() == 60.75  # second 100 is over at 101
    clock.now += 60.5
    assert window.wait_s() == 0.25
    clock.now += 0.25
    assert window.wait_s() == 0
    assert window.remaining == 2


def test_an_amount_beyond_the_limit_is_counted_and_makes_the_next_wait_longer(clock):
    window = MinuteWindow(10, clock)
    window.add(8)
    clock.now += 10
    window.add(25)  # an answer that was longer than what was left
    assert window.remaining == 0
    assert window.wait_s() == window.reset_s() == 60.75
    clock.now += 60.75
    assert window.remaining == 10


def test_what_is_given_back_can_be_used_again(clock):
    window = MinuteWindow(1, clock)
    window.add(1)
    window.add(-1)
    assert window.wait_s() == 0


def test_no_sixty_seconds_see_more_than_the_limit(clock):
    chance, window, let_in = random.Random(0), MinuteWindow(7, clock), []
    for _ in range(3000):
        clock.now += chance.expovariate(1.0)
        if not window.wait_s():
            window.add(1)
            let_in.append(clock.now)
    assert all(later - earlier >= 60 for earlier, later in zip(let_in, let_in[7:], strict=False))
    assert len(let_in) > 7 * (clock.now - 100) / 62 * 0.9  # and hardly fewer than the limit


def test_waiting_as_long_as_is_said_is_enough_and_no_shorter_time_is(clock):
    chance, window = random.Random(1), MinuteWindow(20, clock)
    for _ in range(500):
        clock.now += chance.random() * 5
        if wait_s := window.wait_s():
            clock.now += wait_s - 0.01
            assert window.wait_s() == pytest.approx(0.01)
            clock.now += 0.01 + 1e-9
            assert window.wait_s() == 0
        window.add(chance.randrange(1, 15))
