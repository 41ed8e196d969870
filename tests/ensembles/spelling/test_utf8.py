from __future__ import annotations

import itertools

import pytest

from ensemble_server.ensembles.spelling import END, utf8


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_character_is_allowed():
    for code in (*range(0x80), *range(0x80, 0x11000, 7), *range(0x10FF00, 0x110000), *range(0xD7F0, 0xD800)):
        if not 0xD800 <= code <= 0xDFFF:
            assert utf8.state_after(chr(code).encode()) == utf8.START


@pytest.mark.parametrize("length", [1, 2, 3])
def test_texts_of_few_bytes_are_whole_exactly_if_python_decodes_them(length):
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE]
    edges += [0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    for data in itertools.product(edges, repeat=length):
        assert (utf8.state_after(bytes(data)) == utf8.START) == is_utf8(bytes(data))


def test_characters_of_four_bytes_have_their_own_second_bytes():
    for lead, second in itertools.product((0xF0, 0xF1, 0xF4, 0xF5), (0x7F, 0x80, 0x8F, 0x90, 0xBF, 0xC0)):
        data = bytes([lead, second, 0x80, 0x80])
        assert (utf8.state_after(data) == utf8.START) == is_utf8(data)


def test_a_text_ends_between_two_characters():
    assert utf8.ALLOWED[utf8.START, END]
    assert not utf8.ALLOWED[utf8.state_after("é".encode()[:1]), END]
    assert not utf8.ALLOWED[utf8.BROKEN].any()


def test_what_is_allowed_leads_somewhere():
    for state in range(utf8.BROKEN):
        allowed = utf8.ALLOWED[state, :END]
        assert allowed.any()
        assert (utf8.NEXT[state][allowed] != utf8.BROKEN).all()
        assert (utf8.NEXT[state][~allowed] == utf8.BROKEN).all()
