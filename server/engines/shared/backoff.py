"""When a remote call is tried again, and how long it waits before that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus


@dataclass(frozen=True)
class Backoff:
    """Exponential waits with jitter, unless the remote end says how long."""

    first_s: float = 0.5
    max_s: float = 30.0

    def delay_s(self, num_failed: int, jitter: float, retry_after_s: float | None = None) -> float:
        """Seconds to wait after `num_failed` >= 1 tries: half to all of the nominal wait, as `jitter` in [0, 1) says.

        With the defaults and jitter 0: 0.25, 0.5, 1, 2, ... 15.
        """
        if retry_after_s is not None:
            return retry_after_s
        return min(self.max_s, self.first_s * 2.0 ** min(num_failed - 1, 60)) * (0.5 + jitter / 2)


def is_worth_retrying(status: int) -> bool:
    retried = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
    return status in retried or status >= 500


def parse_retry_after(header: str | None, now: datetime) -> float | None:
    """The Retry-After header (seconds, or a date) as seconds from `now`; None if there is none that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
