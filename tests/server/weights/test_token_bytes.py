"""What every token adds to a text, as members of different vocabularies are averaged over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.tokenizer import Vocabulary
from tests.conftest import make_tokenizer
from tests.server.engines.transformers_engine import vocabularies

TEXTS = ["Two  spaces, a tab\t, and\nlines\n\n", "Ünïcödé, 数学, العربية", "😀 👩‍👩‍👧‍👦 🇩🇪", "It's <0x41> ▁ not"]
KINDS = {
    "byte-level": make_tokenizer,
    "byte-level of another text": vocabularies.byte_level,
    "byte fallback": vocabularies.byte_fallback,
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return Vocabulary(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_bytes_of_its_tokens_are_the_text(vocabulary: Vocabulary, text: str) -> None:
    token_bytes = vocabulary.token_bytes()
    ids = vocabulary.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes[token_id] for token_id in ids) == text.encode()


def test_every_byte_is_a_token_and_special_tokens_are_none(vocabulary: Vocabulary) -> None:
    token_bytes = vocabulary.token_bytes()
    assert len(token_bytes) == vocabulary.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(token_bytes)
    assert {token_bytes[token_id] for token_id in vocabulary.special_ids} == {b""}


def test_letters_and_byte_tokens_may_be_the_same_bytes(tmp_path: Path) -> None:
    vocabularies.byte_fallback(tmp_path)
    token_bytes = Vocabulary(AutoTokenizer.from_pretrained(tmp_path)).token_bytes()
    assert token_bytes.count(b"e") == 2


def test_added_tokens_that_stand_for_text_have_their_bytes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, extra=("<tool>",))
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(tmp_path))
    token_bytes = vocabulary.token_bytes()
    assert token_bytes[vocabulary.token_ids["<tool>"]] == b"<tool>"


def test_words_are_refused(tmp_path: Path) -> None:
    vocabularies.word_piece(tmp_path)
    with pytest.raises(ModelLoadError, match="tokens are not bytes"):
        Vocabulary(AutoTokenizer.from_pretrained(tmp_path)).token_bytes()


def test_a_vocabulary_that_changes_the_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    make_tokenizer(tmp_path)
    backend = PreTrainedTokenizerFast.from_pretrained(tmp_path).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelLoadError, match="comes back as 'the 2nd"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend)).token_bytes()
