from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.engines.shared.backoff import Backoff, is_worth_retrying, parse_retry_after

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_waits_lie_between_half_and_all_of_the_nominal_wait_and_are_bounded(num_failed: int, jitter: float) -> None:
    backoff = Backoff(first_s=0.5, max_s=30)
    nominal = min(30, 0.5 * 2.0 ** min(num_failed - 1, 60))
    assert nominal / 2 <= backoff.delay_s(num_failed, jitter) <= nominal


def test_without_jitter_waits_double_up_to_the_maximum() -> None:
    assert [Backoff(1, 6).delay_s(k, 0) for k in (1, 2, 3, 4, 5)] == [0.5, 1, 2, 3, 3]


def test_the_wait_that_the_remote_end_asks_for_comes_before_our_own() -> None:
    assert Backoff().delay_s(1, 0.3, retry_after_s=17) == 17


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("12", 12),
        (" 0 ", 0),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("Sun, 01 Mar 2026 12:00:05 -0000", 5),
        ("soon", None),
        ("-3", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, NOW) == seconds


def test_only_what_may_pass_is_tried_again() -> None:
    statuses = (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529)
    assert [status for status in statuses if is_worth_retrying(status)] == [408, 409, 429, 500, 502, 503, 529]
