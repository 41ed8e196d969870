from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.tokenizer import Vocabulary
from ensemble_server.server.weights.vocabularies import check_shared_vocabulary, family_of
from tests.conftest import make_tokenizer


@dataclass
class Reader:
    name: str
    surface: Vocabulary
    vocab_size: int


ReaderMaker = Callable[..., Reader]


@pytest.fixture
def reader(tmp_path: Path) -> ReaderMaker:
    """A member with a tokenizer of 320 tokens and some added ones. `rows`: of its weights; default: for all tokens."""

    def make(name: str, *extra: str, rows: int | None = None) -> Reader:
        folder = tmp_path / name
        make_tokenizer(folder, extra=extra)
        vocabulary = Vocabulary(AutoTokenizer.from_pretrained(folder))
        return Reader(name, vocabulary, min(vocabulary.vocab_size, rows or vocabulary.vocab_size))

    return make


def test_equal_vocabularies_are_a_family_in_which_nobody_lacks_anything(reader: ReaderMaker) -> None:
    family = family_of([reader("one", "<a>"), reader("two", "<a>"), reader("three", "<a>")])
    assert (family.width, family.is_uniform, family.added) == (321, True, {})


def test_added_tokens_belong_to_the_members_that_have_them(reader: ReaderMaker) -> None:
    members = [reader("base"), reader("chat", "<pad>", "<tool>"), reader("padded", "<pad>")]
    family = family_of(members)
    assert not family.is_uniform
    assert family.width == 322
    assert family.added == {320: 1, 321: 1}
    assert family.lacking == (frozenset({320, 321}), frozenset(), frozenset({321}))


def test_an_added_token_without_weights_is_not_the_members(reader: ReaderMaker) -> None:
    """A pad token is often added to the tokenizer, and never to the embeddings."""
    family = family_of([reader("base"), reader("padded", "<pad>", rows=320)])
    assert family.is_uniform and family.width == 320
    family = family_of([reader("resized", "<pad>"), reader("padded", "<pad>", rows=320)])
    assert family.lacking == (frozenset(), frozenset({320}))


def test_a_family_is_the_same_in_any_order(reader: ReaderMaker) -> None:
    base, chat, padded = reader("base"), reader("chat", "<pad>", "<tool>"), reader("padded", "<pad>")
    one, other = family_of([base, chat, padded]), family_of([padded, base, chat])
    assert one.width == other.width
    assert (one.lacking[0], one.lacking[1], one.lacking[2]) == (other.lacking[1], other.lacking[2], other.lacking[0])


@pytest.mark.parametrize(
    ("ours", "theirs", "example"),
    [
        (("<a>", "<b>"), ("<b>", "<a>"), "322 and 322 tokens, 4 token-id pairs differ, for example '<a>'"),
        (("<a>",), ("<b>",), "321 and 321 tokens, 2 token-id pairs differ, for example '<a>' with id 320"),
        (("<a>", "<b>"), ("<b>",), "322 and 321 tokens, 3 token-id pairs differ, for example '<a>'"),
    ],
)
def test_what_only_looks_alike_is_refused_with_both_names_and_an_example(
    reader: ReaderMaker, ours: tuple[str, ...], theirs: tuple[str, ...], example: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        family_of([reader("one", *ours), reader("two", *theirs)])
    assert "members 'one' and 'two' have different vocabularies" in str(caught.value)
    assert example in str(caught.value) and "text-level method" in str(caught.value)


def test_members_must_agree_among_each_other_not_only_with_the_first(reader: ReaderMaker) -> None:
    with pytest.raises(ModelLoadError, match="'left' and 'right' have different vocabularies"):
        family_of([reader("base"), reader("left", "<a>"), reader("right", "<b>")])


def test_a_trained_token_that_only_one_has_is_no_added_one(reader: ReaderMaker) -> None:
    smaller = reader("smaller")
    tokens = dict(smaller.surface.token_ids)
    tokens.popitem()
    smaller.surface.token_ids = tokens
    with pytest.raises(ModelLoadError, match="different vocabularies"):
        family_of([reader("base"), smaller])


def test_weights_for_fewer_tokens_than_the_trained_ones_are_told_apart(reader: ReaderMaker) -> None:
    with pytest.raises(ModelLoadError, match="'base' and 'narrow' have one vocabulary, but weights for 320 and 310"):
        family_of([reader("base"), reader("narrow", rows=310)])


def test_one_model_takes_equal_vocabularies_only(reader: ReaderMaker) -> None:
    check_shared_vocabulary([reader("one"), reader("two")])
    with pytest.raises(ModelLoadError, match="320 and 321 tokens, 1 token-id pairs differ, for example '<a>'"):
        check_shared_vocabulary([reader("base"), reader("chat", "<a>")])
