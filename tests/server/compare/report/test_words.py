from __future__ import annotations

import pytest

from ensemble_server.server.compare.report import words
from tests.server.compare.report.sample import difference


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("better", "better than base: −0.100 bits (−0.120 to −0.080)"),
        ("no difference shown", "no difference from base shown: −0.100 bits (−0.120 to −0.080)"),
        (
            "inconclusive",
            "inconclusive against base: −0.100 bits (−0.120 to −0.080); a difference of 0.020 would have shown",
        ),
    ],
)
def test_a_verdict_says_no_more_than_it_knows(verdict: str, said: str) -> None:
    assert words.difference(difference(-0.1, 0.02, verdict), "base", "bits") == said


def test_numbers_keep_their_sign_and_lose_it_at_nothing() -> None:
    assert [words.signed(value) for value in (0.0312, -0.0312, 0.0001, -0.0)] == ["+0.031", "−0.031", "0.000", "0.000"]


def test_missing_numbers_are_dashes() -> None:
    assert (words.number(None), words.size(None), words.interval(None)) == ("–", "–", "no interval")


def test_bytes_have_a_fitting_unit() -> None:
    assert [words.size(value) for value in (540_000_000, 1_234, 12, 3.2e9)] == ["540 MB", "1.23 kB", "12 B", "3.2 GB"]


def test_lists_are_joined_as_in_speech() -> None:
    assert [words.joined(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
