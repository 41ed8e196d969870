from __future__ import annotations

import base64

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from tests.server.api.conftest import asgi_client


async def post(hosting, **body):
    async with asgi_client(hosting) as client:
        return await client.post("/v1/embeddings", json=body)


async def test_texts_become_unit_vectors_in_order(host):
    response = await post(host(), input=["aab", "c"], model="letters")
    answer = CreateEmbeddingResponse.model_validate_json(response.content, strict=True)
    assert [item.index for item in answer.data] == [0, 1]
    assert np.allclose(answer.data[0].embedding, np.array([2, 1, 0]) / np.sqrt(5))
    assert answer.data[1].embedding == [0, 0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)
    assert answer.model == "letters"


async def test_one_text_is_a_list_of_one(host):
    assert len((await post(host(), input="abc")).json()["data"]) == 1


async def test_base64_holds_the_same_numbers(host):
    floats = (await post(host(), input="aab")).json()["data"][0]["embedding"]
    packed = (await post(host(), input="aab", encoding_format="base64")).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), dtype="<f4").tolist() == floats


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "not empty"),
        ({"input": ""}, "input", "not empty"),
        ({"input": ["a", ""]}, "input", "not empty"),
        ({"input": [1, 2]}, "input", "token ids"),
        ({"input": [[1, 2]]}, "input", "check_embedding_ctx_length=False"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a", "dimensions": 2}, "dimensions", "3"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": ["a", "b " * 9]}, "input", "input[1] has 9 tokens, letters reads 8"),
        ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "-1"),
    ],
)
async def test_what_cannot_be_embedded_is_a_400_that_says_why(host, body, param, word):
    response = await post(host(), **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert word in response.json()["error"]["message"]


async def test_the_models_own_number_of_dimensions_may_be_asked_for(host):
    assert (await post(host(), input="a", dimensions=3)).status_code == 200


async def test_long_texts_are_cut_on_request(host):
    response = await post(host(), input="a " * 9, truncate_prompt_tokens=-1)
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == 8


async def test_other_models_do_not_embed(host):
    response = await post(host(), input="a", model="hello")
    assert response.status_code == 404
    assert "letters" in response.json()["error"]["message"]
