"""Halves of UTF-16 pairs in texts of others: joined where both came, else U+FFFD, so that every text can be written.

JSON spells a character beyond U+FFFF as two escapes ("\\ud83d\\ude00"). Writers that cut their text by UTF-16 units put
the halves into two chunks, or lose one. A half alone is no character: no UTF-8 has it, and strict parsers of JSON
refuse the whole value for its sake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"
_STAND_INS = 0x10F800 - 0xD800  # the last 2048 characters of private use, which no text has for its own sake
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?P<half>[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_HALF = re.compile("[\U0010f800-\U0010ffff]")
_PAIR = re.compile("(?P<high>[\U0010f800-\U0010fbff])(?P<low>[\U0010fc00-\U0010ffff])")
_HIGH = re.compile("[\U0010f800-\U0010fbff]\\Z")


def with_mended_escapes(source: str) -> str:
    """A text of JSON in which every escape is a character: "\\ud83d" alone -> "\\ufffd"."""
    return _each_half(source, lambda half: REPLACEMENT)


def with_stand_ins(source: str) -> str:
    """The same with characters for the halves that `PairJoiner` and `without_stand_ins` know: partners may come."""
    return _each_half(source, lambda half: chr(half + _STAND_INS))


def loads(source: str) -> Any:
    """`json.loads` without halves in its strings."""
    return json.loads(with_mended_escapes(source))


def without_halves(text: str) -> str:
    """A Python text that may hold halves, which `str.encode` does not take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def without_stand_ins(text: str) -> str:
    """A text that is whole: pairs as their character, what is left alone as U+FFFD."""
    return _HALF.sub(REPLACEMENT, _PAIR.sub(_joined, text)) if _HALF.search(text) else text


class PairJoiner:
    """Pieces with stand-ins in, text without any out. A first half at the end of a piece waits for the next one."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        if _HIGH.search(text):
            text, self._held = text[:-1], text[-1]
        return without_stand_ins(text)

    def flush(self) -> str:
        """What is left when no more comes."""
        held, self._held = self._held, ""
        return without_stand_ins(held)


def _each_half(source: str, spelled: Callable[[int], str]) -> str:
    if "\\ud" not in source and "\\uD" not in source:
        return source
    return _ESCAPE.sub(
        lambda match: match.group() if match.group("half") is None else spelled(int(match.group("half"), 16)), source
    )


def _joined(pair: re.Match[str]) -> str:
    high, low = (ord(pair.group(name)) - _STAND_INS for name in ("high", "low"))
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
