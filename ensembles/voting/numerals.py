"""Numbers as people and models write them, read to their exact value.

Read are signs (also "minus 3"), currencies, thousands in groups ("1,234.5", "1.234,5", "1 234", "1'234", "1,00,000"),
decimal commas ("0,5"), fractions and mixed numbers ("3/4", "3 1/2", "3½", "3 and a half"), powers ("2^10", "10⁶"),
scientific notation ("1.5e3", "1.5 × 10^3"), repeating decimals ("0.(3)"), square roots that come out even ("√16"), and
magnitudes ("3 million", "5k", "3万", "$2.5M"). Units and percent signs are not part of a number: "18 %" and "18 km"
are 18.

What is written next to a symbol ("2π", "3√2", "2x", "10^n") is no number, and no digits inside it are one. Nor are
times and ratios ("10:30"), dates ("2024-12-24", "24.12.2024"), versions and addresses ("1.2.3", "10.0.0.1") and the
digits in words ("H2O", "x_1", "m^2").

Where a spelling has two readings: "1.234" is a decimal, "1,234" a thousand, and "123 456" in the middle of a text two
numbers, unless a currency stands beside it.

Left out on purpose: numbers in words, and units that make two numbers one ("5 feet 10").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 100  # longer runs of digits are no answers, and would cost time to compare

UNKNOWN = "\ufffc"  # stands where a value is that is no fraction
JOINED = "\u2064"  # invisible plus: 3, JOINED, 1/2 is the mixed number, where 31/2 would be another number

_LETTER = r"A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_GAP = "\u00a0\u202f\u2009"  # spaces that do not end a line, as they group thousands
_UNSIGNED = rf"""(?:
    [1-9]\d{{0,2}}(?:,\d{{3}}){{1,30}}(?:\.\d+)?(?!,?\d)
  | [1-9]\d?(?:,\d\d){{1,8}},\d{{3}}(?:\.\d+)?(?!,?\d)
  | [1-9]\d{{0,2}}(?:(?P<group>['’_{_GAP}])\d{{3}})(?:(?P=group)\d{{3}})*(?:[.,]\d+)?(?!\d)
  | [1-9]\d{{0,2}}(?:\.\d{{3}}){{1,30}},\d+(?![.,]?\d)
  | [1-9]\d{{0,2}}(?:\.\d{{3}}){{2,30}}(?![.,]?\d)
  | (?:(?<![(\[{{])|(?=[\d,]{{1,30}}[^)\]}}\d,]))(?<!\d,)(?:0,\d+|\d+,(?:\d{{1,2}}|\d{{4,}}))(?![\d.]|,\s*\d)
  | \d+(?:\.\d*\(\d{{1,9}}\)|\.\d+)?
  | (?<![\d.])\.\d+
)"""
_PLAIN = r"(?:\d+(?:\.\d+)?|\.\d+)"
_CURRENCY = r"(?:(?:US|HK|NZ|[ACRS])?[$€£¥₹₽₩₪₺₫฿]|(?:Rs\.?|USD|EUR|GBP|INR|CHF|RMB|CNY|AUD|CAD)(?=[\s\d]))\s?"
_OPERAND = r"\s?\(?[-+]?[\w.]*(?:/\w+)?\)?"  # what a root or a power that is not read takes with it
_EXPONENT = r"(?:\^|\*\*)\s?\(?\s?(?P<power>[-+]?\d{1,5})\s?\)?(?![\w(/]|\.\d)|(?P<superscript>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)"
_TOKEN = re.compile(
    rf"""
    (?P<clock>\d+(?::\d+)+)
  | (?P<version>\d+(?:\.\d{{1,2}}){{2,}}(?!\d)|\d+(?:\s?/\s?\d+){{2,}}
      |(?<![\d.-])(?:\d{{4}}-\d{{1,2}}-\d{{1,2}}|\d{{1,2}}[-.]\d{{1,2}}[-.]\d{{4}})(?![\d-]|\.\d)
      |(?!\d{{1,3}}(?:\.\d{{3}}){{3}}(?!\d))\d{{1,3}}(?:\.\d{{1,3}}){{3}}(?!\d))
  | (?P<number>
      (?P<sign>(?<![\w)\]])[-+–](?=[\d.$€£¥₹])|(?<![\d{_LETTER}])(?<!\d\s)(?:minus|negative)\s(?=[\d.$€£¥]))?
      (?P<money>{_CURRENCY})?(?P<sign_inside>(?<=[$€£¥₹])[-–])?
      (?:(?P<whole>\d{{1,4}})(?:{JOINED}|[ {_GAP}]|\s(?:and|&)\s)
         (?P<part>\d{{1,4}})\s?/\s?(?P<parts>\d{{1,4}})(?![.,]?\d)
        |(?P<half>\d+)\s(?:and|&)\sa\shalf\b
        |(?P<spaced>[1-9]\d{{0,2}}(?:\ \d{{3}})+(?:[.,]\d+)?(?![,.\ ]?\d|\ ?/))
        |(?P<value>{_UNSIGNED})
         (?:{_EXPONENT}
           |[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w)
           |\s?[×·⋅*xX]\s?10
            (?:(?:\^|\*\*)\s?\(?(?P<tens>[-+]?\d{{1,3}})\)?|(?P<tens_above>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))(?!\w|\.\d)
           |\s?/\s?(?P<divisor>{_PLAIN})(?![.,]?\d))?
      )
      (?P<after>\s?(?:thousand|tausend|million(?:en|es|s)?|mill[oó]n(?:es)?|milliard(?:en|s|er)?|billions?|trillions?)\b
        |k\b|\s?[万亿億]|(?(money)\s?(?:[KMB]|[mb]n)(?!\w)|(?!)))?
      (?P<symbol>[ {_GAP}]?[*·⋅×]?[ {_GAP}]?(?:[π∞]|pi\b|(?:[√∛]|sqrt\b){_OPERAND})|\s?/\s?[π√xyz](?![{_LETTER}])
        |[xyzni](?![{_LETTER}\d])|\s?\^{_OPERAND}|{JOINED})?
    )
  | (?P<root>[√∛]\s?\(?(?P<radicand>\d{{1,30}})?\)?[{_LETTER}π]?)
  | (?P<unknown>{UNKNOWN})
  | (?P<word>[{_LETTER}π∞][{_LETTER}\d]*(?:[\^_]{_OPERAND}|/\d+|[²³])*|[\^_]{_OPERAND})
    """,
    re.VERBOSE,
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_MAGNITUDES = {
    "k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9,
    "thousand": 10**3, "tausend": 10**3, "mill": 10**6, "milliard": 10**9, "billion": 10**9,
    "trillion": 10**12, "万": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_IS_MONEY_AFTER = re.compile(rf"[ {_GAP}]?(?:[€$£¥₹₽₩₪₺]|EUR|USD|zł|kr\b|Kč|CHF)")


@dataclass(frozen=True)
class Numeral:
    """A number found in a text, from `start` to `end`. `value` is None for what looks like one and has no value here.

    `is_symbolic`: it has a value, but one that cannot be written as a fraction ("2π") or is not known ("2x").
    """

    start: int
    end: int
    value: Fraction | None
    is_symbolic: bool = False


def numerals(text: str) -> Iterator[Numeral]:
    """All numbers in `text`, from left to right: "3 of 1,200.50" -> 3, 1200.5"""
    place = 0
    while (match := _TOKEN.search(text, place)) is not None:
        place = match.end()
        if match.group("spaced") and not _is_one_number(text, match):
            # "rooms 101 102": several numbers, which are read one by one
            head = re.compile(r"[^\d]*\d+").match(text, match.start())
            assert head is not None, "a number has digits"
            place = head.end()
            yield Numeral(match.start(), place, _exact(re.sub(r"\D", "", head.group())))
        elif match.group("number"):
            yield Numeral(match.start(), match.end(), *_value(match))
        elif match.group("clock") or match.group("version"):
            yield Numeral(match.start(), match.end(), None)
        elif match.group("root"):
            yield _root(match)
        elif match.group("unknown") or match.group("word") in ("π", "∞", "pi"):
            yield Numeral(match.start(), match.end(), None, is_symbolic=True)


def exact_value(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else: " 3/4 " -> 3/4; None for any other."""
    text = text.strip()
    found = list(numerals(text))
    if len(found) != 1 or (found[0].start, found[0].end) != (0, len(text)):
        return None
    return found[0].value


def canonical(value: Fraction) -> str | None:
    """Fraction(75, 10) -> "7.5"; Fraction(1, 3) -> "1/3", since its decimals do not end. None if it is too long."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places >= MAX_DIGITS:
        spelled = f"{value.numerator}/{value.denominator}"
        return spelled if max(map(len, spelled.lstrip("-").split("/"))) <= MAX_DIGITS else None
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    if len(whole) + len(decimals) > MAX_DIGITS:
        return None
    sign = "-" if value < 0 else ""
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _is_one_number(text: str, match: re.Match[str]) -> bool:
    """Whether digits in groups of three are one number. Three digits first may as well begin a list: 101 102 103."""
    first = match.group("spaced").split(" ", 1)[0]
    is_all = not text[: match.start()].strip(" $") and not any(char.isdigit() for char in text[match.end() :])
    is_money = bool(match.group("money")) or _IS_MONEY_AFTER.match(text, match.end()) is not None
    return len(first) < 3 or is_all or is_money or match.group("after") is not None


def _value(match: re.Match[str]) -> tuple[Fraction | None, bool]:
    """The value, and whether it is symbolic."""
    if match.group("symbol"):
        return None, True
    value = _magnitude(match)
    if value is not None and match.group("after"):
        name = match.group("after").strip()
        value *= next(number for word, number in sorted(_MAGNITUDES.items(), reverse=True) if name.startswith(word))
    is_negative = match.group("sign") not in (None, "+") or match.group("sign_inside") is not None
    return (-value if value is not None and is_negative else value), False


def _magnitude(match: re.Match[str]) -> Fraction | None:
    group = match.group
    if group("whole"):
        part, parts = int(group("part")), int(group("parts"))
        return Fraction(int(group("whole"))) + Fraction(part, parts) if part < parts else None
    if group("half"):
        whole = _exact(group("half"))
        return None if whole is None else whole + Fraction(1, 2)
    value = _exact(group("spaced") or group("value"))
    if value is None:
        return None
    if group("divisor"):
        divisor = _exact(group("divisor"))
        return value / divisor if divisor else None
    if power := group("power") or (group("superscript") or "").translate(_SUPERSCRIPTS):
        return _power(value, int(power))
    if tens := group("exponent") or group("tens") or (group("tens_above") or "").translate(_SUPERSCRIPTS):
        return None if abs(int(tens)) >= MAX_DIGITS else value * Fraction(10) ** int(tens)
    return value


def _power(base: Fraction, power: int) -> Fraction | None:
    if not base:
        return Fraction(0) if power > 0 else None
    num_digits = abs(power) * max(len(str(base.numerator)), len(str(base.denominator)))
    return base**power if num_digits <= 2 * MAX_DIGITS else None


def _exact(digits: str) -> Fraction | None:
    """The value of digits with separators of any kind: "1.234,50" -> 1234.5, "0.(3)" -> 1/3"""
    if len(digits) > MAX_DIGITS:
        return None
    whole, _, repeating = digits.partition("(")
    if repeating:
        fixed = whole.partition(".")[2]
        period = repeating.rstrip(")")
        return Fraction(whole.rstrip(".")) + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    point = digits.rfind(",") if _has_decimal_comma(digits) else digits.rfind(".")
    if point >= 0 and _has_decimal_comma(digits) is False and digits.count(".") > 1:
        point = -1  # 1.234.567
    whole, decimals = (digits, "") if point < 0 else (digits[:point], digits[point + 1 :])
    whole = "".join(char for char in whole if char.isdecimal())
    return Fraction(f"{whole or 0}.{decimals or 0}")


def _has_decimal_comma(digits: str) -> bool:
    """Whether the comma in it, if any, ends the whole number: 1.234,5 and 0,125 and 3,5; but not 1,234."""
    before, comma, after = digits.rpartition(",")
    if not comma or "," in before or "." in after:
        return False
    return len(after) != 3 or not before.isdecimal() or before.startswith("0") or len(before) > 3


def _root(match: re.Match[str]) -> Numeral:
    """√16 is 4; other roots, and those of symbols, are no fractions."""
    radicand = match.group("radicand")
    is_plain = match.group("root").rstrip(")").endswith(radicand) if radicand else False
    root = math.isqrt(int(radicand)) if is_plain and match.group("root")[0] == "√" else None
    if root is None or root * root != int(radicand):
        return Numeral(match.start(), match.end(), None, is_symbolic=True)
    return Numeral(match.start(), match.end(), Fraction(root))
