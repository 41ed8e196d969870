"""Remote models scored over real HTTP: a server of ours on a tiny model, and ends that answer as others do."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.compare.measures.choice_likelihood import option_logprobs
from ensemble_server.server.compare.measures.documents import Documents, cut_into_documents
from ensemble_server.server.compare.measures.text_measure import NotScored, TextScores, measure_text
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.remote.protocol import Scored, scoring_bodies
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import live_server

TEXT = "To be, or not to be: é — that is the question.\n\n" * 12


def config(models: dict, folder: Path):
    return parse_config({"models": models, "engine": {"max_context": 128}}, source=folder / "config.yaml")


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
async def test_bits_per_byte_and_options_are_those_of_the_same_model_hosted(tiny, tmp_path, monkeypatch, way):
    documents = Documents(tuple(cut_into_documents(TEXT, min_bytes=150)), is_continuous=True)
    path = str(tiny["llama"])
    async with Hosting.open(config({"base": {"path": path, "dtype": "float32"}}, tmp_path)) as here:
        async with live_server(here) as url:
            entry = {"url": f"{url}/v1", "model": "base", "tokenizer": path}
            async with Hosting.open(config({"far": entry}, tmp_path)) as there:
                there.models["far"]._scored_by = ("prompt_logprobs", "echo").index(way)
                far = await measure_text(there, {"far": "far"}, documents, window=48, stride=20)
                options = await option_logprobs(there, "far", "To be, or", ("not to be", "to be"))
        base = await measure_text(here, {"base": "base"}, documents, window=48, stride=20)
        expected = await option_logprobs(here, "base", "To be, or", ("not to be", "to be"))
    ours, theirs = far["far"], base["base"]
    assert isinstance(ours, TextScores) and isinstance(theirs, TextScores)
    assert ours.num_bytes.sum() > 500 and ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, abs=1e-3)
    np.testing.assert_allclose(ours.nats, theirs.nats, atol=1e-3)
    assert options == pytest.approx(expected, abs=1e-3)


async def test_without_a_tokenizer_a_remote_model_is_not_scored_and_the_reason_names_the_key(tmp_path):
    documents = Documents((TEXT,), is_continuous=True)
    async with Hosting.open(config({"far": {"url": "http://127.0.0.1:9/v1"}}, tmp_path)) as there:
        scores = await measure_text(there, {"far": "far"}, documents)
        assert isinstance(scores["far"], NotScored) and "`tokenizer`" in scores["far"].reason
        with pytest.raises(UnsupportedError, match="`tokenizer`"):
            await option_logprobs(there, "far", "a", ("b", "c"))


def end(answers: list[tuple[int, dict]]) -> tuple[RemoteChat, list[dict]]:
    """A remote model whose end gives these answers, and the bodies that it was asked with."""
    asked: list[dict] = []

    async def streamed(body: dict) -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        status, body = answers[len(asked) - 1]
        return httpx.Response(status, content=streamed(body))  # one that is still to be read, as over a wire

    model = RemoteChat("far", RemoteModel(url="http://far.example/v1", max_retries=0))
    model._client = httpx.AsyncClient(base_url="http://far.example/v1/", transport=httpx.MockTransport(answer))
    return model, asked


async def test_an_end_that_refuses_prompt_logprobs_is_asked_for_an_echo_from_then_on():
    echoed = {"choices": [{"text": "x", "logprobs": {"tokens": list("abcd"), "token_logprobs": [None, -1, -2.5, -9]}}]}
    model, asked = end([(400, {"error": {"message": "unknown field"}}), (200, echoed), (200, echoed)])
    assert await model.score((5, 6, 7)) == [-1.0, -2.5]
    assert await model.score((5, 6, 7)) == [-1.0, -2.5]
    assert ["prompt_logprobs" in body for body in asked] == [True, False, False]
    assert asked[1] == scoring_bodies("far", (5, 6, 7))[1] and asked[1]["echo"] is True


async def test_an_end_that_scores_other_tokens_or_none_is_told_apart_from_one_that_fails():
    other = {"choices": [{"prompt_logprobs": [None, {"99": {"logprob": -1.0}}, {"7": {"logprob": -1.0}}]}]}
    model, _ = end([(200, other), (200, {"choices": [{"text": "x"}]})])
    with pytest.raises(UnsupportedError, match="does not score these tokens"):
        await model.score((5, 6, 7))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            {"prompt_logprobs": [None, {"6": {"logprob": -0.5}, "1": {}}, {"7": {"logprob": -2}}]},
            [-0.5, -2],
        ),
        ({"prompt_logprobs": [None, {"6": {"logprob": -0.5}}]}, None),
        ({"logprobs": {"token_logprobs": [None, -0.5, -2]}}, [-0.5, -2]),
        ({"logprobs": {"token_logprobs": [-0.1, -0.5, -2]}}, None),  # it put a token of its own before the text
        ({"logprobs": {"token_logprobs": [-0.5]}}, None),  # only what it wrote
        ({}, None),
    ],
)
def test_log_probabilities_are_taken_only_if_they_are_those_of_the_prompt(choice, expected):
    assert Scored.model_validate({"choices": [choice]}).choices[0].of_prompt((5, 6, 7)) == expected
    assert expected is None or all(math.isfinite(one) for one in expected)
