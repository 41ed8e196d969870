from __future__ import annotations

import pytest

from ensemble_server.server.engines.transformers_engine.byte_prompt import (
    MAX_HEALED,
    common_end,
    healed,
    last_word,
)

TOKENS = [b"", b"a", b"b", b" ", b"the", b" th", b" cat", b"\n"]  # the first is special


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        (b"of the cat", 6),
        (b"of   the", 2),
        (b"word", 0),
        (b"space ", 5),
        (b"two\n\n", 3),
        (b" leading", 0),
        ("né café".encode(), 3),
        (b"", 0),
        (b"x" * 200, 200 - MAX_HEALED),
    ],
)
def test_where_the_last_word_begins(text, begin):
    assert last_word(text) == begin


def test_the_tokens_of_the_last_word_are_left_to_spell():
    assert healed(b"the th", TOKENS, [4, 5]) == ([4], b" th")
    assert healed(b"a b cat", TOKENS, [1, 3, 2, 6]) == ([1, 3, 2], b" cat")


def test_a_token_that_reaches_into_the_last_word_is_left_too():
    tokens = [*TOKENS, b"b ca", b"t"]
    assert healed(b"a b cat", tokens, [1, 3, 8, 9]) == ([1, 3], b"b cat")


def test_one_token_is_always_read():
    assert healed(b"the", TOKENS, [4]) == ([4], b"")
    assert healed(b"the", TOKENS, [0, 4]) == ([0], b"the")


def test_special_tokens_are_not_spelled():
    assert healed(b"a<s>b", TOKENS, [1, 0, 2]) == ([1, 0], b"b")


def test_a_prompt_that_its_tokens_do_not_spell_is_read_as_it_is():
    assert healed(b"A B", TOKENS, [1, 3, 2]) == ([1, 3, 2], b"")


def test_the_longest_common_end():
    assert common_end([b"system\nHello", b"user\nHello", b"\nHello"]) == 6
    assert common_end([b"abc", b"xbc", b"c"]) == 1
    assert common_end([b"a", b"b"]) == 0
    assert common_end([b"same"]) == 4
    assert common_end([b"", b"x"]) == 0
