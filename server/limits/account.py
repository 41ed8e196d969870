"""One key's account: what it may use, what it has used, and who is turned away for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import QuotaError, RateLimitError
from ensemble_server.server.limits.window import MinuteWindow

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import KeyLimits
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.metrics import Metrics

RETRY_STREAM_S = 1.0  # a stream may end at any moment


@dataclass
class TokenCount:
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Used:
    """Since the server began. `requests`: those let in, rows of batches among them; `refused`: those turned away."""

    requests: int = 0
    refused: int = 0
    upload_bytes: int = 0
    models: dict[str, TokenCount] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        return sum(count.prompt_tokens for count in self.models.values())

    @property
    def completion_tokens(self) -> int:
        return sum(count.completion_tokens for count in self.models.values())


class Account:
    """Belongs to the event loop, but for what `upload` gives. Whatever is refused is a `RateLimitError`, a
    `QuotaError` or, of a model, a `ForbiddenModelError` (`house`)."""

    def __init__(
        self, name: str, limits: KeyLimits, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.limits = limits
        self.used = Used()
        self.num_streams = 0
        self._metrics = metrics
        self._windows: dict[str, MinuteWindow] = {}
        for what, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is not None:
                self._windows[what] = MinuteWindow(limit, clock)
        self._uploading = threading.Lock()
        self._num_uploading = 0  # bytes of uploads that are under way
        metrics.key_requests.labels(name)  # none yet is a number, too

    def house(self, hosting: Hosting) -> Hosting:
        """`hosting` as this key sees it."""
        return hosting if self.limits.models is None else hosting.only(self.limits.models)

    def admit(self) -> None:
        """Count one request, or raise `RateLimitError`: as many as allowed were begun, or as many tokens used."""
        for what, window in self._windows.items():
            if wait_s := window.wait_s():
                message = f"key {self.name!r} has used its {window.limit} {what} a minute; try again in {wait_s:.0f} s"
                self._refuse(what, message, wait_s)
        self._count_request(1)

    def take_back(self) -> None:
        """A request that was let in came to nothing, through no fault of its own."""
        self._count_request(-1)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While one answer streams. Raises `RateLimitError` if too many do already."""
        limit = self.limits.streams_at_once
        if limit is not None and self.num_streams >= limit:
            self._refuse(
                "streams", f"key {self.name!r} has {self.num_streams} streams open, {limit} are allowed", RETRY_STREAM_S
            )
        self._count_stream(1)
        try:
            yield
        finally:
            self._count_stream(-1)

    @contextmanager
    def upload(self, num_kept: int) -> Iterator[Callable[[int], None]]:
        """While a file comes in: a function to be told of its bytes, by any thread, before they are kept.

        It raises `QuotaError` once `num_kept`, the bytes that the key keeps already, and all that it is sending come to
        more than it may keep.
        """
        limit, sent = self.limits.upload_bytes, 0

        def grow(num_bytes: int) -> None:
            nonlocal sent
            with self._uploading:
                if limit is not None and num_kept + self._num_uploading + num_bytes > limit:
                    raise QuotaError(
                        f"key {self.name!r} may keep {limit} bytes of uploads and keeps {num_kept}; delete files that "
                        "are not needed any more",
                        param="file",
                    )
                self._num_uploading += num_bytes
                sent += num_bytes

        try:
            yield grow
        except QuotaError:
            self._count_refusal("uploads")
            raise
        else:
            self.used.upload_bytes += sent
            self._metrics.key_upload_bytes.labels(self.name).inc(sent)
        finally:
            with self._uploading:
                self._num_uploading -= sent

    def charge(self, num_tokens: int) -> None:
        """Tokens were read or written for this key; a negative number gives back what was counted too much."""
        if (window := self._windows.get("tokens")) is not None:
            window.add(num_tokens)

    def note_usage(self, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """What an answer came to, once it has ended. Its tokens have been charged."""
        count = self.used.models.setdefault(model, TokenCount())
        count.prompt_tokens += prompt_tokens
        count.completion_tokens += completion_tokens
        self._metrics.key_tokens.labels(self.name, "prompt").inc(prompt_tokens)
        self._metrics.key_tokens.labels(self.name, "completion").inc(completion_tokens)

    def headers(self) -> Mapping[str, str]:
        """OpenAI's headers: what is left of each limit, and when all of it will be free again. None without limits."""
        headers: dict[str, str] = {}
        for what, window in self._windows.items():
            headers[f"x-ratelimit-limit-{what}"] = str(window.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(window.remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(window.reset_s())
        return headers

    def remaining(self) -> dict[str, int]:
        """What may be used in this minute, of each limit that there is."""
        return {f"{what}_per_minute": window.remaining for what, window in self._windows.items()}

    def _refuse(self, what: str, message: str, wait_s: float) -> None:
        self._count_refusal(what)
        raise RateLimitError(message, limit=what, retry_after_s=wait_s)

    def _count_refusal(self, what: str) -> None:
        self.used.refused += 1
        self._metrics.key_refusals.labels(self.name, what).inc()

    def _count_request(self, number: int) -> None:
        self.used.requests += number
        if (window := self._windows.get("requests")) is not None:
            window.add(number)
        if number > 0:
            self._metrics.key_requests.labels(self.name).inc(number)

    def _count_stream(self, number: int) -> None:
        self.num_streams += number
        self._metrics.key_streams.labels(self.name).set(self.num_streams)


def duration(seconds: float) -> str:
    """As OpenAI writes it, in whole seconds: 61.2 -> "1m2s" """
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
