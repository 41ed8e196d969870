"""LaTeX as plain text in which numbers and letters can be found: "\\frac12" is 1/2, "3\\frac{1}{2}" is 3 1/2.

Understood is what answers are written with: fractions with and without braces, roots, powers, `\\boxed`, fonts and
text, spaces, signs and brackets. What is not understood keeps its name. Fractions and roots are worked out where their
parts are numbers; else they stay symbolic, and are no number to `ensembles.voting.numerals`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ensemble_server.ensembles.voting.functions import worked_out
from ensemble_server.ensembles.voting.numerals import JOINED, UNKNOWN, exact_value

MAX_DEPTH = 12  # of commands inside one another; what lies deeper is left as it stands
MAX_UNBRACED = 3  # of commands that are arguments without braces: \\frac\\frac12 3

_FULL_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)}
_CHARS = str.maketrans(
    {**_FULL_WIDTH, "\u2212": "-", "\ufe63": "-", "\u2044": "/", "\u2215": "/", "\u066b": ".", "\u066c": ","}
)
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac")
_BINOMIALS = ("binom", "dbinom", "tbinom")
_CONTENT = re.compile(
    r"text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|bb|cal|strut)|operatorname|[mhf]box|boxed|underline|emph|bm"
    r"|boldsymbol|ensuremath|displaystyle"
)
_SYMBOLS = {
    "times": "×", "cdot": "·", "ast": "*", "div": "÷", "pi": "π", "infty": "∞", "degree": "°", "circ": "°", "pm": "±",
    "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "implies": "⇒", "to": "→",
    "Rightarrow": "⇒", "rightarrow": "→", "therefore": "∴", "dots": "…", "ldots": "…", "cdots": "…", "quad": " ",
    "qquad": " ", "pounds": "£", "euro": "€", "yen": "¥", "percent": "%", "checkmark": "✓", "lbrace": "{",
    "rbrace": "}", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "lvert": "|", "rvert": "|", "vert": "|",
    "sum": UNKNOWN, "prod": UNKNOWN, "int": UNKNOWN, "iint": UNKNOWN, "oint": UNKNOWN, "lim": UNKNOWN,
    "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "", "dollar": "$",
}  # fmt: skip
_MARKS = {",": "\u202f", " ": "\u00a0", ";": " ", ":": " ", "!": "", "(": "", ")": "", "[": "", "]": "", "\\": "\n"}
_NUMBER_OR_EXPONENT = re.compile(r"[-+]?\s?\d+")
_GROUP_OF_DIGITS = re.compile(r"(?<![\w}])\{(?P<digits>\d{1,100})\}(?![{\d])|\{(?P<comma>,)\}")
_UNIT = re.compile(r"\\(?:text|mathrm|textrm|rm)\s?\{[^\d{}]*\}(?:\^\{?\d\}?)?")
_ORDINAL = re.compile(r"(?:\\(?:text|mathrm)\s?\{?)?\s?(?:st|nd|rd|th)\}?")
_BOXED = re.compile(r"(?:\\f?boxed|\bboxed(?=\s*\{))(?![A-Za-z])")

# What is left of a backslash and a letter that some JSON made one control character of.
_SWALLOWED = (
    (re.compile("\x08oxed\\b"), r"\\boxed"),
    (re.compile("\x0crac\\b"), r"\\frac"),
    (re.compile(r"\t(?=(?:ext(?:bf|it|rm)?|frac)\s?\{|imes\b)"), r"\\t"),
    (re.compile(r"\\\\(?=(?:boxed|fbox|[dt]?frac|text|times|sqrt|pi|cdot|left|right|math)\b)"), r"\\"),
)


@dataclass(frozen=True)
class Boxed:
    """What stands in a box, and where the box begins and ends."""

    start: int
    end: int
    content: str


def normalized(text: str) -> str:
    """One spelling for full-width characters, minus signs, fraction bars and commands that JSON has damaged."""
    text = text.translate(_CHARS)
    for pattern, whole in _SWALLOWED:
        text = pattern.sub(whole, text)
    return text


def boxed(text: str) -> list[Boxed]:
    """The boxes of a normalized text: `\\boxed{a \\text{b}}` with braces in braces, `\\boxed 2`, `\\boxed\\frac12`."""
    reader = _Reader(text)
    found: list[Boxed] = []
    for match in _BOXED.finditer(text):
        start, end, next_place = reader.argument(match.end(), len(text), 0)
        if text[start - 1 : start] != "{" or text[end : end + 1] == "}":
            found.append(Boxed(match.start(), next_place, text[start:end]))
        else:  # a brace that nothing closes: the text was cut off, or the line is all
            line_end = text.find("\n", start)
            end = len(text) if line_end < 0 else line_end
            found.append(Boxed(match.start(), end, text[start:end].rstrip(" $")))
    return found


def plain(text: str) -> str:
    """A normalized text without its LaTeX: `$3\\frac12$ \\text{ cm}^2` -> "$3", JOINED, "1/2$ cm^2" """
    if not any(char in text for char in "\\{^~_½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"):
        return text
    return _Reader(text).read(0, len(text), 0)


class _Reader:
    """Reads one text. The partners of all braces are known beforehand, so that reading takes linear time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._partner: dict[int, int] = {}
        open_braces: list[int] = []
        is_escaped = False
        for place, char in enumerate(text):
            if is_escaped:
                is_escaped = False
            elif char == "\\":
                is_escaped = True
            elif char == "{":
                open_braces.append(place)
            elif char == "}" and open_braces:
                self._partner[open_braces.pop()] = place

    def read(self, start: int, end: int, depth: int) -> str:
        """text[start:end] as plain text."""
        out: list[str] = []
        place = start
        while place < end:
            char = self._text[place]
            if char == "\\":
                place = self._command(place, end, depth, out)
            elif char in "^_":
                place = self._script(place, end, depth, out)
            elif char in _VULGAR:
                _append_fraction(out, _VULGAR[char])
                place += 1
            elif char == "~":
                out.append("\u00a0")
                place += 1
            elif char == "{" and (group := _GROUP_OF_DIGITS.match(self._text, place, end)):
                out.append(group.group("digits") or ",")
                place = group.end()
            else:
                out.append(char)
                place += 1
        return "".join(out)

    def argument(self, place: int, end: int, depth: int, num_unbraced: int = 0) -> tuple[int, int, int]:
        """Where the next argument of a command starts and ends, and where the text goes on.

        It is what stands in braces, or a whole number's first digit, or a command with its own arguments.
        """
        while place < end and self._text[place] in " \t\n":
            place += 1
        if place >= end:
            return end, end, end
        if self._text[place] == "{":
            close = self._partner.get(place, end)
            return place + 1, min(close, end), min(close + 1, end)
        if self._text[place] != "\\" or depth >= MAX_DEPTH or num_unbraced >= MAX_UNBRACED:
            return place, place + 1, place + 1
        name = _name(self._text, place, end)
        after = place + 1 + len(name)
        for _ in range(
            2 if name in (*_FRACTIONS, *_BINOMIALS) else int(name == "sqrt" or _CONTENT.fullmatch(name) is not None)
        ):
            _, _, after = self.argument(after, end, depth, num_unbraced + 1)
        return place, after, after

    def _command(self, place: int, end: int, depth: int, out: list[str]) -> int:
        """Read the command at `place`; return where the text goes on."""
        name = _name(self._text, place, end)
        after = place + 1 + len(name)
        if depth >= MAX_DEPTH:
            out.append(" ")
        elif name in _FRACTIONS:
            return self._fraction(after, end, depth, out)
        elif name in _BINOMIALS:
            return self._binomial(after, end, depth, out)
        elif name == "sqrt":
            return self._root(after, end, depth, out)
        elif name == "overline" and re.search(r"\d\.\d*$", "".join(out[-40:])):
            first, last, after = self.argument(after, end, depth)
            out.append(f"({self.read(first, last, depth + 1)})")
        elif _CONTENT.fullmatch(name):
            if after < end and self._text[after] == "{" and after in self._partner:
                first, last, after = self.argument(after, end, depth)
                out.append(self.read(first, last, depth + 1))
        elif name in _SYMBOLS:
            out.append(_SYMBOLS[name])
        elif len(name) == 1 and not name.isalpha():
            out.append(_MARKS.get(name, name))
        else:
            out.append(f" {name} ")
        return after

    def _fraction(self, place: int, end: int, depth: int, out: list[str]) -> int:
        parts = []
        sources = []
        for _ in range(2):
            first, last, place = self.argument(place, end, depth)
            sources.append(self._text[first:last].strip())
            parts.append(self.read(first, last, depth + 1).strip())
        if all(map(_UNIT.fullmatch, sources)):
            out.append(f" {parts[0]}/{parts[1]}")
            return place
        above, below = (exact_value(worked_out(part.strip("$ "), is_formula=True)) for part in parts)
        if above is None or below is None:
            out.append(f"({parts[0]})/({parts[1]}){UNKNOWN}")
        elif not below:
            out.append("1/0")
        else:
            whole = above.denominator == below.denominator == 1 and above >= 0 and below > 0
            value = above / below
            above_text, below_text = (above, below) if whole else (value.numerator, value.denominator)
            _append_fraction(out, f"{above_text}/{below_text}")
            if self._text[place : place + 1].isdecimal():
                out.append(JOINED)
        return place

    def _binomial(self, place: int, end: int, depth: int, out: list[str]) -> int:
        parts = []
        for _ in range(2):
            first, last, place = self.argument(place, end, depth)
            parts.append(self.read(first, last, depth + 1).strip())
        out.append(f" C({parts[0]},{parts[1]})")
        return place

    def _root(self, place: int, end: int, depth: int, out: list[str]) -> int:
        sign = "√"
        if self._text[place : place + 1] == "[" and (close := self._text.find("]", place, min(end, place + 20))) > 0:
            sign = "∛"
            place = close + 1
        first, last, place = self.argument(place, end, depth)
        inner = self.read(first, last, depth + 1).strip()
        out.append(f"{sign}{inner}" if inner.isdecimal() else f"{sign}({inner})")
        return place

    def _script(self, place: int, end: int, depth: int, out: list[str]) -> int:
        """A power or an index: ^{10} as ^10, an ordinal's ending without its sign, ^{\\circ} as a degree."""
        sign = self._text[place]
        if self._text[place + 1 : place + 2] not in ("{", "\\") or depth >= MAX_DEPTH:
            out.append(sign)
            return place + 1
        first, last, after = self.argument(place + 1, end, depth)
        inner = self._text[first:last].strip()
        if _ORDINAL.fullmatch(inner):
            return after
        inner = self.read(first, last, depth + 1).strip()
        if inner in ("°", "'", "′"):
            out.append(inner)
        elif _NUMBER_OR_EXPONENT.fullmatch(inner):
            out.append(f"{sign}{inner.replace(' ', '')}")
            if self._text[after : after + 1].isdecimal():
                out.append(JOINED)
        else:
            out.append(f"{sign}({inner.replace('=', ':')})")  # the i = 1 below a sum says nothing of its value
        return after


def _append_fraction(out: list[str], fraction: str) -> None:
    """3 and 1/2 are joined as a mixed number, so that they do not read 31/2."""
    before = "".join(out[-2:])[-1:]
    if before.isdecimal():
        out.append(JOINED)
    out.append(fraction)


def _name(text: str, place: int, end: int) -> str:
    """The name of the command whose backslash stands at `place`: letters, or one other character."""
    stop = place + 1
    while stop < end and text[stop].isascii() and text[stop].isalpha():
        stop += 1
    return text[place + 1 : max(stop, min(place + 2, end))]
