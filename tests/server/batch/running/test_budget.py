"""The policy on its own: a simulated clock, and rows that take whatever hypothesis makes them take."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.batch.running.budget import MAX_RESERVED_S, RESERVED_SHARE, TimeBudget, parse_duration


@dataclass
class Simulation:
    """Rows run `at_once` at a time; row k wants `wants[k]` seconds and is cut when its allowance is over."""

    total_s: float
    at_once: int
    wants: list[float]
    per_row_max_s: float | None = None
    now: float = 0.0
    allowances: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def run(self) -> TimeBudget:
        budget = TimeBudget(
            self.total_s, at_once=self.at_once, per_row_max_s=self.per_row_max_s, clock=lambda: self.now
        )
        free = [0.0] * self.at_once
        for place, want in enumerate(self.wants):
            self.now = heapq.heappop(free)
            allowed = budget.allowance_s(len(self.wants) - place)
            assert allowed is not None
            used = min(want, allowed)
            budget.ended(allowed, used)
            self.allowances.append(allowed)
            self.ends.append(self.now + used)
            heapq.heappush(free, self.now + used)
        return budget


WANTS = st.lists(st.floats(0, 1e4), min_size=1, max_size=60)


@given(total_s=st.floats(1, 1e5), at_once=st.integers(1, 9), wants=WANTS)
def test_all_rows_begin_and_end_within_the_budget(total_s: float, at_once: int, wants: list[float]) -> None:
    simulation = Simulation(total_s, at_once, wants)
    simulation.run()
    reserved = min(RESERVED_SHARE * total_s, MAX_RESERVED_S)
    assert max(simulation.ends) <= total_s - reserved + 1e-6 * total_s


@given(total_s=st.floats(1, 1e5), at_once=st.integers(1, 9), wants=WANTS)
def test_no_row_gets_less_than_if_all_were_slow_and_shared_alike(
    total_s: float, at_once: int, wants: list[float]
) -> None:
    simulation = Simulation(total_s, at_once, wants)
    simulation.run()
    fair = (total_s - min(RESERVED_SHARE * total_s, MAX_RESERVED_S)) / -(-len(wants) // at_once)
    assert min(simulation.allowances) >= fair * (1 - 1e-6)


@given(total_s=st.floats(1, 1e5), at_once=st.integers(1, 9), wants=WANTS, most=st.floats(0.1, 1e4))
def test_no_row_gets_more_than_the_most_per_row(total_s: float, at_once: int, wants: list[float], most: float) -> None:
    simulation = Simulation(total_s, at_once, wants, per_row_max_s=most)
    simulation.run()
    assert max(simulation.allowances) <= most


def test_time_that_a_row_leaves_over_goes_to_the_others() -> None:
    slow = Simulation(1000, 1, [1e9] * 4)
    slow.run()
    assert slow.allowances == pytest.approx([245, 245, 245, 245])  # 2 % reserved, four rows
    banked = Simulation(1000, 1, [5, 1e9, 1e9, 1e9])
    budget = banked.run()
    assert banked.allowances == pytest.approx([245, 325, 325, 325])  # (980 - 5) / 3
    assert budget.banked_s == pytest.approx(240)
    assert budget.num_cut_short == 3


def test_without_a_total_rows_have_their_own_limit_or_none() -> None:
    assert TimeBudget(None, at_once=4, per_row_max_s=7).allowance_s(100) == 7
    assert TimeBudget(None, at_once=4).allowance_s(100) is None


def test_a_spent_budget_allows_nothing() -> None:
    now = 0.0
    budget = TimeBudget(10, at_once=2, clock=lambda: now)
    now = 11.0
    assert budget.allowance_s(5) == 0
    assert budget.left_s == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4h45m", 17100),
        ("90", 90),
        ("90s", 90),
        ("1.5h", 5400),
        ("2H", 7200),
        ("1d2h3m4.5s", 93784.5),
        (" 5 m ", 300),
        ("0.5s", 0.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "5x", "m5", "45m4h", "nan", "inf", "1.5h30m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a time above zero"):
        parse_duration(text)
