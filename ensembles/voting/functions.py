"""Functions of numbers in an answer, worked out where their value is exact: 5! is 120, |-3| is 3, C(5,2) is 10.

What has no exact value here (log 100, sin 30°, f(5)) becomes `numerals.UNKNOWN`: the number inside a function is never
the answer. In prose an exclamation mark is mostly an exclamation, so that it counts as a factorial only where the text
goes on as a formula does ("5! = 120").

Left out on purpose: sums and products of several terms, logarithms and trigonometry, which models work out themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from ensemble_server.ensembles.voting.numerals import UNKNOWN, canonical, exact_value

MAX_FACTORIAL = 69  # the last with fewer digits than a number may have
MAX_ROUNDS = 6  # of functions inside one another

_WHOLE = r"\d{1,4}(?![\d.]|,\d)"
_NAMED = (
    r"log|ln|lg|exp|sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|det|dim|deg|arg|Gamma|varphi|phi|max|min"
    r"|gcd|lcm|abs|floor|ceil|factorial|fact|binom|comb|nCr|nPr|perm"
)
_ROOT_WORDS = re.compile(r"(?<![A-Za-z])(?:sqrt|square root of)[ \t]{0,3}(?=[\d(])", re.IGNORECASE)
_CUBE_ROOT_WORDS = re.compile(r"(?<![A-Za-z])(?:cbrt|cube root of)[ \t]{0,3}(?=[\d(])", re.IGNORECASE)
_CALL = re.compile(
    rf"(?<![A-Za-z])(?P<name>{_NAMED}|[CP](?=\(\d{{1,4}},))(?:_\w{{1,3}})?\((?P<inside>[^()\n]{{0,80}})\)"
)
_CALL_IN_FORMULA = re.compile(
    rf"(?<![A-Za-z])(?:(?P<name>{_NAMED})(?:\s?_\(?\w{{1,3}}\)?)?\s{{0,3}}"
    r"(?:\((?P<inside>[^()\n]{0,80})\)|[-+]?[\d.,]{1,30}(?:/\d{1,9}|°)?)"
    r"|[A-Za-zφΓ]\([-+]?\d[^()=\n]{0,80}\))"
)
_CHOSEN = re.compile(
    rf"[_^]?\(?(?<![\d.])(?P<n>\d{{1,4}})\)?\s?(?P<name>[CP])\s?_?\(?(?P<k>{_WHOLE})\)?(?!\w)"
    rf"|(?<![\d.])(?P<of>\d{{1,4}})\s+choose\s+(?P<chosen>{_WHOLE})"
)
_ROUNDED = re.compile(r"⌊(?P<floor>[^⌊⌋⌈⌉\n]{0,60})⌋|⌈(?P<ceil>[^⌊⌋⌈⌉\n]{0,60})⌉")
_ABSOLUTE = re.compile(r"\|(?P<inside>[^|\n]{1,60})\|")
_FACTORIAL = re.compile(
    rf"(?:(?<![\w.,)])(?P<n>{_WHOLE})|\((?P<inside>[^()\n]{{1,40}})\)|(?P<other>[\d.,]{{1,30}}))\s{{0,2}}"
    r"(?P<signs>!{1,2})(?!=)|(?<![\w)!])!\s?\d{1,30}"
)
_FACTORIAL_IN_PROSE = re.compile(
    rf"(?<![\w.,)])(?P<n>{_WHOLE})(?:!(?=[,;]|\s{{0,2}}[=×·*/^]|\$)|\sfactorial\b)", re.IGNORECASE
)


def worked_out(text: str, *, is_formula: bool) -> str:
    """A text without LaTeX, with the values of functions in their place: "5!/3!" -> "120/6", "log 100" -> UNKNOWN.

    `is_formula`: it stands in a box; nothing in it is an exclamation or an article.
    """
    if not any(sign in text for sign in "!|(⌊⌈") and not re.search(r"[a-zCP]", text):
        return text
    text = _CUBE_ROOT_WORDS.sub("∛", _ROOT_WORDS.sub("√", text))
    for _ in range(MAX_ROUNDS):
        before = text
        text = _ROUNDED.sub(_rounded, text)
        if is_formula:
            text = _FACTORIAL.sub(_factorial, _CHOSEN.sub(_chosen, _ABSOLUTE.sub(_absolute, text)))
        else:
            text = _FACTORIAL_IN_PROSE.sub(lambda match: _shown(_factorial_of(Fraction(match.group("n")), 1)), text)
        text = _CALL.sub(_called, text)
        text = _CALL_IN_FORMULA.sub(_called, text) if is_formula else text
        if text == before:
            break
    return text


def _shown(value: Fraction | None) -> str:
    return UNKNOWN if value is None else canonical(value) or UNKNOWN


def _called(match: re.Match[str]) -> str:
    found = match.groupdict()
    name, inside = found.get("name"), found.get("inside")
    if name not in _EXACT or inside is None:
        return UNKNOWN
    values = [exact_value(part) for part in inside.split(",")]
    known = [value for value in values if value is not None]
    return _shown(_EXACT[name](known) if len(known) == len(values) else None)


def _chosen(match: re.Match[str]) -> str:
    n, k = (Fraction(match.group(one) or match.group(other)) for one, other in (("n", "of"), ("k", "chosen")))
    return _shown(_counted(math.perm if match.group("name") == "P" else math.comb)([n, k]))


def _rounded(match: re.Match[str]) -> str:
    inside = match.group("floor")
    value = exact_value(match.group("ceil") if inside is None else inside)
    return UNKNOWN if value is None else _shown(Fraction(math.ceil(value) if inside is None else math.floor(value)))


def _absolute(match: re.Match[str]) -> str:
    value = exact_value(match.group("inside").strip("{} "))
    return match.group() if value is None else _shown(abs(value))


def _factorial(match: re.Match[str]) -> str:
    inside = match.group("n") or match.group("inside")
    value = exact_value(inside) if inside else None
    return UNKNOWN if value is None else _shown(_factorial_of(value, len(match.group("signs"))))


def _factorial_of(value: Fraction, step: int) -> Fraction | None:
    """`step` 2: the double factorial, 5 * 3 * 1."""
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        return None
    return Fraction(math.prod(range(int(value), 0, -step)))


def _counted(count: Callable[[int, int], int]) -> Callable[[list[Fraction]], Fraction | None]:
    def of(values: list[Fraction]) -> Fraction | None:
        if len(values) != 2 or any(value.denominator != 1 or not 0 <= value <= 1000 for value in values):
            return None
        return Fraction(count(*map(int, values)))

    return of


def _of_whole(combine: Callable[..., int]) -> Callable[[list[Fraction]], Fraction | None]:
    def of(values: list[Fraction]) -> Fraction | None:
        return None if any(value.denominator != 1 for value in values) else Fraction(combine(*map(int, values)))

    return of


def _of_one(function: Callable[[Fraction], Fraction | int]) -> Callable[[list[Fraction]], Fraction | None]:
    return lambda values: Fraction(function(values[0])) if len(values) == 1 else None


_EXACT: dict[str, Callable[[list[Fraction]], Fraction | None]] = {
    "max": lambda values: max(values) if len(values) > 1 else None,
    "min": lambda values: min(values) if len(values) > 1 else None,
    "gcd": _of_whole(math.gcd),
    "lcm": _of_whole(math.lcm),
    "abs": _of_one(abs),
    "floor": _of_one(math.floor),
    "ceil": _of_one(math.ceil),
    **dict.fromkeys(("factorial", "fact"), lambda values: _factorial_of(values[0], 1) if len(values) == 1 else None),
    **dict.fromkeys(("C", "binom", "comb", "nCr"), _counted(math.comb)),
    **dict.fromkeys(("P", "perm", "nPr"), _counted(math.perm)),
}
