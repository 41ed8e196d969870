"""What must not leave this process though a remote end may say it: our key, and what its URL holds besides the address.

A dead end's URL stands in errors, and servers repeat what they were sent in theirs. Every text of a remote end passes
through here, also answers, whose pieces and tokens may cut a secret anywhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from urllib.parse import quote, unquote

import httpx

from ensemble_server.ensembles.base import TokenLogprob
from ensemble_server.ensembles.surrogates import PairJoiner, without_stand_ins

BLANK = "***"
MIN_CHARS = 4  # shorter ones would blank words; they are never shown with their URL all the same


class Secrets:
    """`blank`, `stream` and `tokens` replace each of `values`, wherever it stands.

    `words`: those of them that answers may say, since they are words: a user called "admin" is no secret of its own.
    """

    def __init__(self, values: Iterable[str], words: Collection[str] = ()) -> None:
        self.values = tuple(sorted({value for value in values if len(value) >= MIN_CHARS}, key=len, reverse=True))
        self._in_answers = tuple(value for value in self.values if value not in words)

    @classmethod
    def of(cls, url: httpx.URL, key: str | None) -> Secrets:
        """Those of a member: its key, and the user, the password and all values of parameters in its URL, but for
        numbers of versions. In the forms in which they travel: as they are, quoted, and as a header has them."""
        userinfo = url.userinfo.decode(errors="replace")
        user, _, password = userinfo.partition(":")
        parameters = [part.partition("=") for part in url.query.decode().split("&")]
        raw = [user, password, *(value for name, _, value in parameters if "version" not in name.lower())]
        plain = [*map(unquote, raw), *([key] if key else [])]
        header = base64.b64encode(unquote(userinfo).encode()).decode() if userinfo else ""
        words = {user} if password and user.isalpha() else ()
        return cls([*raw, *plain, *(quote(value, safe="") for value in plain), header], words)

    def blank(self, text: str) -> str:
        return _blanked(without_stand_ins(text), self.values)

    def stream(self) -> BlankedStream:
        return BlankedStream(self._in_answers)

    def tokens(self) -> BlankedTokens:
        return BlankedTokens(self._in_answers)


class BlankedStream:
    """Pieces of a text in, the same without secrets out, and in whole characters. What may be the beginning of a secret
    is held back."""

    def __init__(self, values: Sequence[str]) -> None:
        self._values = values
        self._pairs = PairJoiner()
        self._held = ""

    def add(self, piece: str) -> str:
        text = _blanked(self._held + self._pairs.add(piece), self._values)
        num_held = max((_overlap(text, value) for value in self._values), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        held, self._held = self._held + self._pairs.flush(), ""
        return held


class BlankedTokens:
    """As `BlankedStream`, for the tokens beside a text: each that is part of a secret is blanked, and what else might
    have stood in its place is left out."""

    def __init__(self, values: Sequence[str]) -> None:
        self._values = values
        self._held: tuple[TokenLogprob, ...] = ()

    def add(self, tokens: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
        if not self._values:
            return tuple(tokens)
        tokens = (*self._held, *tokens)
        text = "".join(token.text for token in tokens)
        spans = [found.span() for value in self._values for found in re.finditer(re.escape(value), text)]
        open_from = len(text) - max((_overlap(text, value) for value in self._values), default=0)
        shown: list[TokenLogprob] = []
        end = 0
        for place, token in enumerate(tokens):
            start, end = end, end + len(token.text)
            is_secret = any(first < end and start < last for first, last in spans)
            if end > open_from and not is_secret:
                self._held = tokens[place:]
                return tuple(shown)
            shown.append(_blank_token(token) if is_secret else self._plain(token))
        self._held = ()
        return tuple(shown)

    def flush(self) -> tuple[TokenLogprob, ...]:
        held, self._held = self._held, ()
        return tuple(map(self._plain, held))

    def _plain(self, token: TokenLogprob) -> TokenLogprob:
        """A token that is no secret, without alternatives that are."""
        top = tuple(
            _blank_token(other) if any(value in other.text for value in self._values) else other for other in token.top
        )
        return replace(token, top=top)


def _blank_token(token: TokenLogprob) -> TokenLogprob:
    return replace(token, text=BLANK, bytes=BLANK.encode(), top=())


def _blanked(text: str, values: Sequence[str]) -> str:
    for value in values:
        text = text.replace(value, BLANK)
    return text


def without_secrets(url: httpx.URL) -> str:
    """An address for the log: scheme, host, port and path."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def _overlap(text: str, value: str) -> int:
    """Length of the longest end of `text` that is a beginning of `value`: ("abc", "cd") -> 1"""
    return next((n for n in range(min(len(text), len(value) - 1), 0, -1) if text.endswith(value[:n])), 0)
