from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.server.batch.job.store import Counts
from ensemble_server.server.batch.running.progress import LINE_INTERVAL_S, ProgressView, described, duration, spend
from ensemble_server.server.batch.running.runner import Progress
from ensemble_server.server.engines.engine import Loading


def progress(**changes: Any) -> Progress:
    known = {
        "counts": Counts(total=10, ok=4, failed=1, cut=0),
        "running": 2,
        "done": 5,
        "prompt_tokens": 500,
        "completion_tokens": 100,
        "members": {"base": MemberUsage(1500, 100), "paid": MemberUsage(20, 3, 0.125)},
        "elapsed_s": 50.0,
    }
    return Progress(**known | changes)


def test_a_status_has_errors_rate_time_left_and_spend() -> None:
    assert described(progress()) == [
        "1 errors",
        "2 tokens/s",
        "50s left",
        "base 1.5k+100 tokens",
        "paid 20+3 tokens, 0.12",
    ]


def test_the_time_left_follows_from_this_runs_rows_alone() -> None:
    """A job of 1000 rows, 900 of them from an earlier run; this one made 10 in 20 s, so 90 more take 180 s."""
    resumed = progress(counts=Counts(total=1000, ok=910, failed=0, cut=0), done=10, elapsed_s=20.0, members={})
    assert described(resumed)[-1] == "3m00s left"


def test_nothing_is_said_that_is_not_known_yet() -> None:
    fresh = progress(
        counts=Counts(total=10, ok=0, failed=0, cut=0), done=0, prompt_tokens=0, completion_tokens=0, members={}
    )
    assert described(fresh) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (5400, "1h30m"), (90_000, "25h00m")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_spend_counts_in_thousands_and_millions() -> None:
    assert spend({"a": MemberUsage(999, 2_500_000)}) == ["a 999+2.5M tokens"]


def test_away_from_a_terminal_a_line_comes_every_few_seconds() -> None:
    file, now = io.StringIO(), 0.0
    with ProgressView(Console(file=file, width=80), clock=lambda: now) as view:
        for _ in range(12):
            view.update(progress())
            now += 1.0
    assert 11 // LINE_INTERVAL_S == 2
    assert file.getvalue().splitlines() == [" · ".join(["5/10 rows", *described(progress())])] * 2


def test_a_terminal_shows_a_bar_that_goes_away() -> None:
    file = io.StringIO()
    with ProgressView(Console(file=file, width=120, force_terminal=True)) as view:
        view.update(progress())
        view.say("a sentence")
    assert "5/10" in file.getvalue()
    assert "a sentence\n" in file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_loaded_is_said_of_how_many(is_terminal: bool) -> None:
    file = io.StringIO()
    with ProgressView(Console(file=file, width=120, force_terminal=is_terminal)) as view:
        for number, name in enumerate(("base", "code"), start=1):
            view.loading(Loading(name, number, 2))
        view.update(progress())
    if is_terminal:
        assert "loading code (2 of 2)" in file.getvalue()
    else:
        assert file.getvalue() == "loading base (1 of 2)\nloading code (2 of 2)\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_shown_if_nothing_is_wanted(is_terminal: bool) -> None:
    file, now = io.StringIO(), 0.0
    console = Console(file=file, force_terminal=is_terminal)
    with ProgressView(console, is_shown=False, clock=lambda: now) as view:
        now = 60.0
        view.update(progress())
    assert file.getvalue() == ""
