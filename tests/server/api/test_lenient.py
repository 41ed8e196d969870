"""What front ends and other servers' clients send is understood, where there is one thing that it can mean."""

from __future__ import annotations

import pytest

from ensemble_server.server.engines.scripted_engine import Script
from tests.server.api.conftest import CHAT, asgi_client


@pytest.mark.parametrize("path", ["/health", "/live", "/ready", "/version", "/v1/models", "/metrics", "/openapi.json"])
async def test_what_can_be_read_answers_head_without_a_body(host, path):
    async with asgi_client(host()) as client:
        whole, head = await client.get(path), await client.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_head_of_what_can_only_be_sent_is_refused_as_get_is(host):
    async with asgi_client(host()) as client:
        assert (await client.head("/v1/chat/completions")).status_code == 405
        assert (await client.head("/v1/nothing")).status_code == 404


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1//messages", "/v1/messages"),
        ("/v1/message", "/v1/messages"),
        ("/api/chat", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
    ],
)
async def test_a_wrong_base_url_is_told_the_right_path(host, asked, meant):
    async with asgi_client(host()) as client:
        response = await client.post(asked, json=CHAT)
    assert response.status_code == 404
    assert response.json()["error"]["message"].endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("asked", ["/v1/nothing", "/", "/v1", "//"])
async def test_nothing_is_suggested_where_nothing_is_near(host, asked):
    async with asgi_client(host({"web": False})) as client:
        response = await client.post(asked, json=CHAT)
    assert response.status_code in (404, 405)
    assert "did you mean" not in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_minus_one_means_as_many_tokens_as_fit(host, field):
    hosting = host(m=Script(("a",)))
    async with asgi_client(hosting) as client:
        await client.post("/v1/chat/completions", json=CHAT | {field: -1})
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
    assert all(request.sampling.max_tokens is None for request in hosting.models["m"].requests)


async def test_empty_stop_strings_stop_nothing_and_a_top_p_of_nothing_takes_the_likeliest(host):
    hosting = host(m=Script(("a",)))
    async with asgi_client(hosting) as client:
        for stop in ("", [""], ["", "\n"]):
            response = await client.post("/v1/chat/completions", json=CHAT | {"stop": stop, "top_p": 0})
            assert response.status_code == 200
    asked = [request.sampling for request in hosting.models["m"].requests]
    assert [sampling.stop for sampling in asked] == [(), (), ("\n",)]
    assert all(0 < sampling.top_p < 1e-6 for sampling in asked)


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
async def test_no_tools_are_no_tools(host, choice):
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"tools": []} | choice)
    assert response.status_code == 200


SCHEMA = {"type": "object", "properties": {"z": {"const": 1}}, "required": ["z"]}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ],
)
async def test_a_schema_is_honoured_wherever_it_stands(host, wanted):
    hosting = host(m=Script(("a",)))
    async with asgi_client(hosting) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT | {"response_format": wanted})).status_code == 200
    grammar = hosting.models["m"].requests[0].sampling.grammar
    assert grammar.kind == "json_schema" and '"z"' in grammar.source
