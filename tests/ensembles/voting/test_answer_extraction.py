from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.voting.answer_extraction import extract, same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So it costs $18.", "18"),
        ("18.00", "18"),
        (r"Therefore \boxed{18}", "18"),
        (r"\boxed{1} and then \boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{18\text{ dollars}}", "18"),
        ("the answer is 18 apples, since 3*6 = 18 and 18+1 = 19.", "18"),
        ("The answer is 3 + 4 = 7, as 7 < 9", "7"),
        ("The answer to the question is 12 km.", "12"),
        ("Answer: x = 4\nCheck: 4 + 1 = 5", "4"),
        ("**Final Answer**\n\n**1,234.50**", "1234.5"),
        ("She has 3 * 7 = <<3*7=21>>21 kittens.\nA: 21", "21"),
        ("A: Let's think. There are 3 apples and 4 pears in the bag, so 7 in all.", "7"),
        ("work...\n#### -1,000", "-1000"),
        ("First 10, then 20", "20"),
        ("10-5", "5"),
        ("x = -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−3", "-3"),
        ("-.5", "-0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("1e3", "1000"),
        ("2.5E-2", "0.025"),
        ("3/4 of it", "0.75"),
        ("2/6", "1/3"),
        ("1/0", None),
        ("18%", "18"),
        ("25 m²", "25"),
        ("25 m2", "25"),
        ("１８", "18"),
        ("١٨", "18"),
        ("共18个苹果", "18"),
        ("答案是 42。", "42"),
        ("1\u202f000", "1000"),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, expected: str | None) -> None:
    assert extract(text, "number") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        ("(c).", "C"),
        ("**B**", "B"),
        ("The answer is (B).", "B"),
        ("answer is A because it is", "A"),
        ("the answer is a number", None),
        ("Answer: c", "C"),
        ("The answer is Option E", "E"),
        (r"\boxed{\text{D}}", "D"),
        ("C) 25", "C"),
        ("A) 1\nB) 2\nC) 3\nSo B", "B"),
        ("A) 1\nB) 2\nSo A.", "A"),
        ("I think it is D, not (B), so D", "D"),
        ("The correct choice is therefore (E)", "E"),
        ("I am not sure", None),
        ("A cat", None),
        ("", None),
    ],
)
def test_choices(text: str, expected: str | None) -> None:
    assert extract(text, "choice") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("no, because yes", "no"),
        ("**No**", "no"),
        ("The answer is True", "yes"),
        ("Answer: not true", "no"),
        ("that is not correct", "no"),
        ("there are no apples, so yes", "yes"),
        ("FALSE", "no"),
        ("maybe", None),
        ("nothing yesterday", None),
        ("", None),
    ],
)
def test_yes_and_no(text: str, expected: str | None) -> None:
    assert extract(text, "yes_no") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("I thought long.\nAnswer: the  Eiffel tower!", "eiffel tower"),
        (r"\boxed{\text{Ça va}}", "ça va"),
        ("नमस्ते", "नमस्ते"),
        ("你好。", "你好"),
        ("?!", None),
        ("the", None),
        (" ", None),
    ],
)
def test_short_texts(text: str, expected: str | None) -> None:
    assert extract(text, "text") == expected


def test_agreement_is_of_values_not_of_spelling() -> None:
    assert same_answer("18", "It is $18.00", "number")
    assert same_answer("(b)", "The answer is B", "choice")
    assert not same_answer("18", "81", "number")


def test_two_abstentions_do_not_agree() -> None:
    assert not same_answer("dunno", "dunno", "number")


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4, allow_nan=False, allow_infinity=False))
def test_a_number_is_found_again_in_any_spelling(value: Decimal) -> None:
    spellings = [f"{value}", f"{value:,}", f"The answer is ${value:,f}.", rf"\boxed{{{value}}}", f"1 + 1 = {value:f}"]
    found = {extract(spelling, "number") for spelling in spellings}
    assert len(found) == 1
    assert Fraction(found.pop()) == Fraction(value)


@given(st.text(max_size=200), st.sampled_from(["number", "choice", "yes_no", "text"]))
def test_canonical_answers_are_found_in_themselves(text: str, kind: str) -> None:
    answer = extract(text, kind)
    if answer is not None and kind != "text":
        assert extract(answer, kind) == answer


@pytest.mark.parametrize("piece", ["answer ", "1,", "{", r"\boxed{", r"\frac{", "$ ", "A:\n", "9", "(", "  \n", "* "])
@pytest.mark.parametrize("kind", ["number", "choice", "yes_no", "text"])
def test_long_hostile_texts_take_no_long_time(piece: str, kind: str) -> None:
    started = time.process_time()
    extract(piece * (50_000 // len(piece)), kind)
    assert time.process_time() - started < 2
