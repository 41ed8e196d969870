from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.windows import cut_windows
from ensemble_server.server.weights.view import Surface
from tests.conftest import SAMPLE, make_tokenizer


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    return Surface(load(tmp_path_factory.mktemp("tokenizer")))


def load(folder: Path):
    from transformers import AutoTokenizer

    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


@given(st.data())
def test_every_token_but_a_streams_first_is_scored_once_in_order(surface, data) -> None:
    texts = tuple(data.draw(st.lists(st.text(st.sampled_from("the é😀\n(x)"), min_size=1), min_size=1, max_size=5)))
    window = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, window - 1))
    documents = Documents(texts, is_continuous=data.draw(st.booleans()))
    windows = cut_windows(surface, documents, window=window, stride=stride)
    scored = [token_id for piece in windows for token_id in piece.token_ids[piece.first_scored :]]
    streams = ["".join(texts)] if documents.is_continuous else texts
    expected = [surface.encode(stream, add_special_tokens=False) for stream in streams]
    assert scored == [token_id for ids in expected for token_id in ids[1:]]
    assert all(1 <= piece.first_scored < len(piece.token_ids) <= window for piece in windows)
    num_bytes = sum(int(piece.num_bytes.sum()) for piece in windows)
    first_bytes = [len(surface.bytes_of(ids[0])) for ids in expected]
    total = sum(len(text.encode()) for text in texts)
    # a first token that is part of a character leaves all of that character to its last token
    assert total - sum(first_bytes) <= num_bytes <= total
    assert all(len(piece.documents) == len(piece.token_ids) - piece.first_scored for piece in windows)


def test_a_token_belongs_to_the_document_in_which_it_begins(surface) -> None:
    documents = Documents(("The qui", "ck brown fox"), is_continuous=True)
    (window,) = cut_windows(surface, documents, window=100)
    begin = 0
    for token_id, document, size in zip(window.token_ids, [0, *window.documents], [3, *window.num_bytes], strict=True):
        assert document == int(begin >= len("The qui"))
        assert size == len(surface.bytes_of(token_id)) or begin == 0
        begin += len(surface.bytes_of(token_id))


def test_a_smaller_stride_gives_more_context(surface) -> None:
    documents = Documents((SAMPLE,), is_continuous=True)
    windows = cut_windows(surface, documents, window=20, stride=5)
    assert {window.first_scored for window in windows[1:]} == {15}
    assert windows[0].first_scored == 1


def test_a_tokenizers_own_beginning_opens_every_window_and_predicts_the_first_token(tmp_path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    surface = Surface(tokenizer)
    documents = Documents((SAMPLE,), is_continuous=True)
    windows = cut_windows(surface, documents, window=20)
    assert {window.token_ids[0] for window in windows} == {0}
    scored = [token_id for window in windows for token_id in window.token_ids[window.first_scored :]]
    assert scored == surface.encode(SAMPLE, add_special_tokens=False)
    assert sum(window.num_bytes.sum() for window in windows) == len(SAMPLE.encode())


def test_the_default_stride_is_the_experts_rule(surface) -> None:
    ids = surface.encode(SAMPLE, add_special_tokens=False)
    windows = cut_windows(surface, Documents((SAMPLE,), is_continuous=True), window=64)
    assert [window.token_ids for window in windows] == [
        tuple(ids[first : first + 64]) for first in range(0, len(ids) - 1, 63)
    ]
    assert np.concatenate([window.documents for window in windows]).max() == 0
