import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.documents import (
    Documents,
    cut_into_documents,
    read_documents,
    switching_text,
)

TEXTS = st.text(st.sampled_from("ab é😀\n\n#:\t\r\u2028\x0c"), max_size=400)


@given(TEXTS, st.integers(1, 60))
def test_every_byte_is_in_exactly_one_document(text, min_bytes):
    documents = cut_into_documents(text, min_bytes=min_bytes)
    assert "".join(documents) == text
    assert all(documents)


@given(TEXTS, st.integers(1, 60))
def test_no_document_is_too_short_unless_the_text_is(text, min_bytes):
    documents = cut_into_documents(text, min_bytes=min_bytes)
    assert len(documents) <= 1 or all(len(document.encode()) >= min_bytes for document in documents)


def test_documents_begin_after_blank_lines_and_at_headings():
    text = "one\ntwo\n\nthree\n# four\nfive\n"
    assert cut_into_documents(text, min_bytes=6) == ["one\ntwo\n\n", "three\n", "# four\nfive\n"]


def test_a_text_without_borders_is_cut_at_line_ends():
    text = "abcdefghi\n" * 20
    assert [len(document) for document in cut_into_documents(text, min_bytes=10)] == [10] * 20


def test_a_blank_line_that_comes_too_late_is_not_waited_for():
    text = "abcdefghi\n" * 5 + "\n" + "abcdefghi\n" * 2
    assert [len(document) for document in cut_into_documents(text, min_bytes=15)] == [20, 20, 31]


def test_lines_longer_than_a_document_are_cut_at_sentences_and_sentences_at_spaces():
    prose = "A first one. And a second! Is this the third? " * 3 + "Yes.\n"
    documents = cut_into_documents(prose, min_bytes=30)
    assert all(30 <= len(document) <= 60 and document.rstrip()[-1] in ".!?" for document in documents)
    words = cut_into_documents("word " * 40, min_bytes=20)
    assert {len(document) for document in words} == {20}
    assert cut_into_documents("x" * 100, min_bytes=20) == ["x" * 100]  # no place to cut


def test_prose_with_long_paragraphs_gives_as_many_documents_as_fit():
    paragraph = "The quick brown fox jumps over the lazy dog, and nobody minds it. " * 60 + "\n\n"
    documents = cut_into_documents(paragraph * 5, min_bytes=1000)
    assert len(documents) >= 0.75 * len(paragraph) * 5 / 1000


def test_lines_of_json_are_documents_of_their_own(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("first\u2028", "second")) + "\n\n")
    documents = read_documents(path)
    assert documents == Documents(("first\u2028", "second"), is_continuous=False)
    assert documents.streams == [(0,), (1,)]


def test_a_plain_file_is_one_stream(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\r\n\r\nb\n")  # line ends stay as they are
    documents = read_documents(path, min_bytes=1)
    assert documents == Documents(("a\r\n\r\n", "b\n"), is_continuous=True)
    assert documents.streams == [(0, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xff", "byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}', "line 2: must be an object"),
        ("a.jsonl", b'{"text": "a"', "line 1: is not JSON"),
        ("a.jsonl", b"\n", "is empty"),
    ],
)
def test_a_file_that_holds_no_documents_is_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.txt: cannot be read"):
        read_documents(tmp_path / "nothing.txt")


def test_domains_take_turns():
    documents = switching_text({"a": "a" * 30, "b": "b" * 100}, piece_bytes=10, min_bytes=20)
    assert documents.texts == ("a" * 10 + "b" * 10,) * 3
    assert documents.is_continuous


def test_pieces_end_at_lines_in_their_second_half():
    documents = switching_text({"a": "aa\naaaa\naaaaa", "b": "b" * 16}, piece_bytes=8, min_bytes=1)
    assert documents.texts == ("aa\naaaa\nbbbbbbbb", "aaaaabbbbbbbb")


@given(TEXTS, TEXTS, st.integers(8, 50))
def test_switching_text_keeps_each_domain_in_order_and_whole_characters(first, second, piece_bytes):
    first, second = first.replace("b", "a"), second.replace("a", "b")
    text = "".join(switching_text({"a": first, "b": second}, piece_bytes=piece_bytes, min_bytes=30).texts)
    only_a, only_b = ("".join(c for c in text if c == letter) for letter in "ab")
    assert "".join(c for c in first if c == "a").startswith(only_a)
    assert "".join(c for c in second if c == "b").startswith(only_b)


def test_equal_texts_give_equal_switching_texts():
    texts = {"a": "one two\n" * 100, "b": "drei 😀\n" * 100}
    assert switching_text(texts) == switching_text(texts)


def test_pieces_too_small_for_a_character_are_refused():
    with pytest.raises(ValueError, match="at least 8"):
        switching_text({"a": "b"}, piece_bytes=3)
