from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ConfigDict, TypeAdapter, with_config

from ensemble_server.server.requests.vote import MAX_CANDIDATES, MAX_CHARS, VoteResult
from tests.server.api.conftest import asgi_client

Strict = with_config(ConfigDict(strict=True, extra="forbid"))(VoteResult)


async def post(host: Callable, body: Any, **server: Any) -> Any:
    async with asgi_client(host(server)) as client:
        return await client.post("/v1/vote", json=body)


async def test_ranking_matrix_margin_and_classes_come_back(host: Callable) -> None:
    answer = await post(host, {"candidates": ["a dog", "the cat is here", "the cat is there", "the cat is here"]})
    assert answer.status_code == 200
    result = TypeAdapter(Strict).validate_python(answer.json())
    assert (result["object"], result["winner"], result["text"]) == ("vote", 1, "the cat is here")
    assert result["ranking"] == [1, 3, 2, 0]
    assert result["scores"] == [0, 1.75, 1.5, 1.75]
    assert result["margin"] == 0
    assert result["ties"] == [[1, 3]]
    assert result["equal_texts"] == [[0], [1, 3], [2]]
    assert result["matrix"] == result["similarity"]["rouge_l_word"]
    assert result["matrix"][1] == [0, 1, 0.75, 1]


async def test_similarities_are_blended_and_weights_count(host: Callable) -> None:
    body = {
        "candidates": [{"text": "abc", "weight": 3}, {"text": "cab"}, "x a"],
        "similarity": {"embedding": 2, "rouge_l_char": 1},
    }
    result = (await post(host, body)).json()
    # characters: LCS(abc, cab) = 2 of 3 and 3, F = 2/3; letters a, b, c alike: cosine 1
    assert result["matrix"][0][1] == pytest.approx(2 + 2 / 3)
    assert result["winner"] == 0
    assert set(result["similarity"]) == {"embedding", "rouge_l_char"}


async def test_blank_candidates_are_named(host: Callable) -> None:
    result = (await post(host, {"candidates": ["", "a", "a"]})).json()
    assert result["incomparable"] == {"rouge_l_word": [0]}
    assert result["scores"] == [0, 1, 1]


@pytest.mark.parametrize("text", ["你好，世界", "مرحبا بالعالم", "👍🏽", "e\u0301"])
async def test_any_script_agrees_with_itself(host: Callable, text: str) -> None:
    result = (await post(host, {"candidates": [text, "other words", text], "similarity": "rouge_l_word"})).json()
    assert (result["winner"], result["scores"]) == (0, [1, 0, 1])


async def test_one_candidate_is_enough(host: Callable) -> None:
    result = (await post(host, {"candidates": ["alone"]})).json()
    assert (result["winner"], result["margin"], result["scores"]) == (0, 0, [0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "candidates"),
        ({"candidates": []}, "candidates"),
        ({"candidates": ["a"] * (MAX_CANDIDATES + 1)}, "candidates"),
        ({"candidates": ["a" * MAX_CHARS, "b"]}, "candidates"),
        ({"candidates": ["a", 3]}, "candidates[1]"),
        ({"candidates": [{"text": "a", "weight": -1}]}, "candidates[0].weight"),
        ({"candidates": ["a"], "similarity": "bleu"}, "similarity"),
        ({"candidates": ["a"], "similarity": {"embedding": 0}}, "similarity.embedding"),
        ({"candidates": ["a"], "similarity": []}, "similarity"),
        ({"candidates": ["a"], "prune": 2}, "prune"),
    ],
)
async def test_wrong_bodies_are_refused_with_their_field(host: Callable, body: dict, param: str) -> None:
    answer = await post(host, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_without_an_embedding_model_that_similarity_is_refused(host: Callable) -> None:
    hosting = host()
    hosting.embedder = None
    async with asgi_client(hosting) as client:
        answer = await client.post("/v1/vote", json={"candidates": ["a", "b"], "similarity": "embedding"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_parameter"


async def test_unknown_keys_are_ignored_or_refused_as_configured(host: Callable) -> None:
    body = {"candidates": ["a"], "similarty": "embedding"}
    answer = await post(host, body)
    assert answer.headers["x-ignored-parameters"] == "similarty"
    answer = await post(host, body, strict_params=True)
    assert answer.status_code == 400
    assert "did you mean 'similarity'" in answer.json()["error"]["message"]


async def test_the_document_describes_what_is_accepted(host: Callable) -> None:
    async with asgi_client(host()) as client:
        schema = (await client.get("/openapi.json")).json()["components"]["schemas"]["VoteBody"]
    kinds = {kind["type"] for kind in schema["properties"]["similarity"]["anyOf"]}
    assert kinds == {"string", "array", "object"}
    assert {"type": "string"} in schema["properties"]["candidates"]["items"]["anyOf"]
