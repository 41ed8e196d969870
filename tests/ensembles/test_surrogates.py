from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.surrogates import (
    PairJoiner,
    loads,
    with_mended_escapes,
    with_stand_ins,
    without_halves,
    without_stand_ins,
)

FACE = "\U0001f600"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(["\ud83d", "\ude00", "\\", "u", "d"]))))
def test_escaped_json_of_any_text_is_read_to_what_can_be_written(text: str) -> None:
    source = json.dumps(text)
    assert loads(source) == without_halves(text)
    loads(source).encode()


@given(st.text(st.characters(max_codepoint=0x10F7FF)), st.data())
def test_a_text_cut_between_utf16_units_is_joined_again(text: str, data: st.DataObject) -> None:
    units = text.encode("utf-16-le", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(units) // 2), max_size=4)))
    ends = [0, *cuts, len(units) // 2]
    pieces = [units[2 * a : 2 * b].decode("utf-16-le", "surrogatepass") for a, b in pairwise(ends)]
    joiner = PairJoiner()
    shown = [joiner.add(json.loads(with_stand_ins(json.dumps(piece)))) for piece in pieces]
    assert "".join(shown) + joiner.flush() == text


def test_a_half_that_stays_alone_is_a_replacement_character() -> None:
    joiner = PairJoiner()
    shown = [joiner.add(json.loads(with_stand_ins(piece))) for piece in ('"a\\ud83d"', '"b\\ude00"', '"\\ud83d"')]
    assert (shown, joiner.flush()) == (["a", "\ufffdb\ufffd", ""], "\ufffd")
    assert without_stand_ins(json.loads(with_stand_ins('"\\ude00\\ud83d"'))) == "\ufffd\ufffd"


@pytest.mark.parametrize("source", ['"\\\\ud83d"', f'"{FACE}"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00 \\u00e9"', '"\\'])
def test_json_without_halves_stays_as_it_is(source: str) -> None:
    assert with_mended_escapes(source) == source
    assert with_stand_ins(source) == source
