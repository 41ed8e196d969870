from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ensemble_server.server.engines.transformers_engine.spare_time import MAX_TOKENS, SHARE, SpareTime


def chore(done: list[str], *names: str) -> Iterator[None]:
    for name in names:
        done.append(name)
        yield


def test_each_piece_of_time_does_one_piece_of_work_and_chores_come_one_after_the_other() -> None:
    done: list[str] = []
    spare = SpareTime([chore(done, "a", "b"), chore(done, "c")])
    for expected in (["a"], ["a", "b"], ["a", "b", "c"]):
        spare.work()
        assert done == expected and spare.has_work
    spare.work()
    assert not spare.has_work


def test_work_beside_steps_takes_a_share_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # a piece takes a second
    done: list[str] = []
    spare = SpareTime([chore(done, *map(str, range(100)))])
    counts = []
    for _ in range(40):
        spare.after_step(1, 1.0)
        counts.append(len(done))
    assert counts[0] == 1
    assert counts[-1] == pytest.approx(40 * SHARE, abs=1)


def test_steps_of_many_tokens_earn_nothing() -> None:
    done: list[str] = []
    spare = SpareTime([chore(done, "a")])
    spare.after_step(MAX_TOKENS + 1, 100.0)
    assert not done
    spare.after_step(MAX_TOKENS, 1.0)
    assert done == ["a"]


def test_a_chore_that_fails_ends_the_work_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Iterator[None]:
        yield
        raise ArithmeticError("a layer computes something else")

    spare = SpareTime([failing()])
    spare.work()
    spare.work()
    assert not spare.has_work
    assert "a layer computes something else" in caplog.text
