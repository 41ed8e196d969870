"""Functions with an exact value are worked out; all others have none."""

from __future__ import annotations

import math

import pytest

from ensemble_server.ensembles.voting.functions import MAX_FACTORIAL, worked_out
from ensemble_server.ensembles.voting.numerals import MAX_DIGITS, UNKNOWN


@pytest.mark.parametrize("n", [0, 1, 5, MAX_FACTORIAL])
def test_factorials_are_those_of_the_standard_library(n: int) -> None:
    assert worked_out(f"{n}!", is_formula=True) == str(math.factorial(n))


def test_the_next_factorial_would_be_too_long_for_a_number() -> None:
    assert len(str(math.factorial(MAX_FACTORIAL + 1))) > MAX_DIGITS
    assert worked_out(f"{MAX_FACTORIAL + 1}!", is_formula=True) == UNKNOWN


def test_functions_inside_one_another_are_worked_out_from_within() -> None:
    assert worked_out("max(3!, |-7|, C(4,2))", is_formula=True) == "7"


def test_a_function_of_what_is_no_number_has_no_value() -> None:
    assert worked_out("gcd(x, 4)", is_formula=True) == UNKNOWN
    assert worked_out("max()", is_formula=True) == UNKNOWN


@pytest.mark.parametrize(
    "text", ["That makes 18!", "18! Great", "a table | 5 | 6 |", "call it f(5)", "max (5)", "", "!"]
)
def test_prose_stays_as_it_is(text: str) -> None:
    assert worked_out(text, is_formula=False) == text
