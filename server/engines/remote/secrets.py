"""What must not leave this process though a remote end may say it: our key, and what its URL holds besides the address.

A dead end's URL stands in errors, and servers repeat what they were sent in theirs. Every text of a remote end passes
through here, also answers, whose pieces may cut a secret anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

import httpx

BLANK = "***"
MIN_CHARS = 4  # shorter ones would blank words; they are never shown with their URL all the same


class Secrets:
    """`blank` and `stream` replace each of `values`, wherever it stands."""

    def __init__(self, values: Iterable[str]) -> None:
        self.values = tuple(sorted({value for value in values if len(value) >= MIN_CHARS}, key=len, reverse=True))

    @classmethod
    def of(cls, url: httpx.URL, key: str | None) -> Secrets:
        """Those of a member: its key, and the user, the password and all values of parameters in its URL."""
        userinfo = url.userinfo.decode(errors="replace")
        raw = [*userinfo.split(":", 1), *(part.partition("=")[2] for part in url.query.decode().split("&"))]
        return cls([*raw, *map(unquote, raw), *([key] if key else [])])

    def blank(self, text: str) -> str:
        for value in self.values:
            text = text.replace(value, BLANK)
        return text

    def stream(self) -> BlankedStream:
        return BlankedStream(self)


class BlankedStream:
    """Pieces of a text in, the same without secrets out. What may be the beginning of one is held back."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._held = ""

    def add(self, piece: str) -> str:
        text = self._secrets.blank(self._held + piece)
        num_held = max((_overlap(text, value) for value in self._secrets.values), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def without_secrets(url: httpx.URL) -> str:
    """An address for the log: scheme, host, port and path."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def _overlap(text: str, value: str) -> int:
    """Length of the longest end of `text` that is a beginning of `value`: ("abc", "cd") -> 1"""
    return next((n for n in range(min(len(text), len(value) - 1), 0, -1) if text.endswith(value[:n])), 0)
