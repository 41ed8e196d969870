from __future__ import annotations

import math
from io import StringIO

import pytest
from rich.console import Console

from ensemble_server.ensembles.base import Delta, MemberToken, TokenLogprob
from ensemble_server.server.cli.explained import ExplainedAnswer, shares, trace_lines


def view(probability: float, weight: float) -> MemberToken:
    return MemberToken(math.log(probability) if probability else -9999.0, weight)


def token(text: str, **members: MemberToken) -> TokenLogprob:
    return TokenLogprob(0, text, text.encode(), -1.0, members=members or None)


def shown(*deltas: Delta, colours: bool) -> str:
    console = Console(file=StringIO(), force_terminal=True, color_system="standard" if colours else None, width=200)
    answer = ExplainedAnswer(console)
    for delta in deltas:
        answer.show(delta)
    answer.print_summary(None)
    return console.file.getvalue()  # type: ignore[attr-defined]


def delta(*tokens: TokenLogprob, text: str | None = None) -> Delta:
    return Delta(0, "".join(part.text for part in tokens) if text is None else text, tokens=tokens)


BASE = token("Paris", base=view(0.6, 0.5), code=view(0.2, 0.5))
CODE = token("()", base=view(0.1, 0.5), code=view(0.9, 0.5))


def test_a_share_is_the_part_of_the_pooled_probability() -> None:
    # 0.5 · 0.6 of 0.5 · 0.6 + 0.25 · 0.4 = 0.4
    assert shares({"a": view(0.6, 0.5), "b": view(0.4, 0.25)}) == pytest.approx({"a": 0.75, "b": 0.25})


def test_a_negative_weight_drives_nothing_and_neither_does_a_member_that_lacks_the_token() -> None:
    assert shares({"a": view(0.5, 1.5), "b": view(0.9, -0.5)}) == {"a": 1.0, "b": 0.0}
    assert shares({"a": view(0.5, 0.1), "b": view(0.0, 0.9)}) == {"a": 1.0, "b": 0.0}
    assert shares({"a": MemberToken(-math.inf, 1.0)}) == {"a": 0.0}
    assert shares({}) == {}


def test_each_token_has_the_colour_of_its_driver() -> None:
    said = shown(delta(BASE, CODE), colours=True)
    assert said.startswith("\x1b[36mParis\x1b[0m\x1b[35m()\x1b[0m")  # cyan, magenta
    # base: (0.75 + 0.1) / 2, code: (0.25 + 0.9) / 2
    assert "\x1b[35mcode  57%" in said
    assert "\x1b[36mbase  42%" in said


def test_without_colours_a_run_of_tokens_begins_with_its_drivers_name() -> None:
    said = shown(delta(BASE), delta(BASE), delta(CODE), colours=False)
    assert said.startswith("⟨base⟩ParisParis⟨code⟩()")
    assert "\x1b" not in said


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=StringIO(), force_terminal=True, width=200)
    ExplainedAnswer(console).show(delta(BASE))
    assert console.file.getvalue() == "⟨base⟩Paris"  # type: ignore[attr-defined]


def test_text_that_several_tokens_make_up_is_shown_as_it_came() -> None:
    halves = (token("\ufffd", base=view(0.5, 1.0)), token("\ufffd", base=view(0.5, 1.0)))
    assert shown(delta(*halves, text="é"), colours=False).startswith("⟨base⟩é")


def test_text_without_tokens_and_escape_codes_in_it_are_harmless() -> None:
    assert shown(Delta(0, "a\x1b[31mb"), colours=True) == "a[31mb"


def test_a_vote_tells_its_candidates_scores_and_who_was_silent() -> None:
    trace = {
        "candidates": [
            {"member": "base", "sample": 0, "text": "It is\n18."},
            {"member": "code", "sample": 0, "text": "x" * 100},
        ],
        "silent": [{"member": "away", "sample": 0, "reason": "no answer"}],
        "scores": [1.5, 0.25],
        "votes": {"18": 2.0, "7": 1},
        "answer": "18",
        "agreement": 0.667,
        "matrix": [[1.0]],
        "averaged": True,
    }
    assert list(trace_lines(trace)) == [
        "base 0  1.5  It is 18.",
        "code 0  0.25  " + "x" * 59 + "…",
        "away was silent: no answer",
        "votes: 18 2, 7 1",
        "answer: 18",
        "agreement: 0.667",
    ]
