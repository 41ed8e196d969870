"""Bodies that are made to hold others up, beside a stream: what they cost is bounded, and the stream goes on meanwhile.

`benchmarks/hostile.py` measures the delays; here only order and counts are held.
"""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest

from ensemble_server.server.api import json_body
from ensemble_server.server.api.json_body import MAX_VALUES, require_few_values
from ensemble_server.server.engines.scripted_engine import Script
from tests.server.api.conftest import CHAT, live_server

JSON = {"content-type": "application/json"}
MB = 1_000_000


def chat_with(rest: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"x"}],' + rest + b"}"


HOSTILE = {
    "wrong messages": lambda: b'{"messages":[' + b",".join([b"{}"] * 90_000) + b"]}",
    "right messages": lambda: b'{"messages":[' + b",".join([b'{"role":"user","content":"x"}'] * 20_000) + b"]}",
    "too many values": lambda: b'{"messages":[' + b",".join([b"{}"] * 260_000) + b"]}",
    "wrong biases": lambda: chat_with(b'"logit_bias":{' + b",".join(b'"%d":"x"' % n for n in range(30_000)) + b"}"),
    "unknown names": lambda: chat_with(b",".join(b'"x%d":1' % n for n in range(20_000))),
    "wrong stop tokens": lambda: chat_with(b'"stop_token_ids":[' + b",".join([b'"x"'] * 90_000) + b"]"),
    "deep": lambda: b'{"messages":' + b"[" * MB + b"]" * MB + b"}",
    "quotes": lambda: b'{"messages":"' + b'\\"' * MB + b'"}',
    "a number": lambda: b'{"messages":' + b"9" * MB + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_stream_goes_on_while_a_hostile_body_is_refused(host, name):
    """The stream's pieces come one by one, each after a turn of the event loop that the body could have taken."""
    stream = Script(tuple("abcdefghij"), delay_s=0.01)
    limits = {"max_body_bytes": 16 * 1024**2}
    async with live_server(host(limits, m=stream)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answered: list[str] = []

        async def listen() -> None:
            while True:
                async with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            answered.append("piece")

        listening = asyncio.create_task(listen())
        while not answered:
            await asyncio.sleep(0.005)
        refused = await client.post("/v1/chat/completions", content=HOSTILE[name](), headers=JSON)
        healthy = await client.get("/health")
        listening.cancel()
    assert healthy.status_code == 200
    assert refused.status_code == 400
    assert len(refused.content) < 4000
    assert answered.count("piece") > 2


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * MAX_VALUES + b"1]",
        b"[" + b"{}," * MAX_VALUES + b"1]",
        b"{" + b'"a":1,' * (MAX_VALUES // 3) + b'"b":[]}',
        b'["a\\\\", "b\\"",' + b'"c",' * MAX_VALUES + b"1]",
    ],
)
def test_many_values_are_refused_before_they_are_parsed(body):
    with pytest.raises(json_body.RequestError, match="JSON values"):
        require_few_values(body)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_values_are_counted_outside_of_texts_wherever_the_pieces_end(monkeypatch, size):
    monkeypatch.setattr(json_body, "COUNTED_BYTES", size)
    value = {"a": ['x,[{"', "\\", '\\"', "\\\\,,", {"b\\": "[,]"}, 'end"'], "c": ["{", "\\\\\\", 1, 2]}
    body = orjson.dumps(value)
    num_values = 9 + 2 * 3 + 4 * 4  # outside of texts: commas, two for each name, four for each bracket that opens
    monkeypatch.setattr(json_body, "MAX_VALUES", num_values)
    require_few_values(body)
    monkeypatch.setattr(json_body, "MAX_VALUES", num_values - 1)
    with pytest.raises(json_body.RequestError):
        require_few_values(body)


async def test_a_long_text_full_of_commas_is_one_value(host):
    body = orjson.dumps({"prompt": 'a, b, [c], {d} \\ " ' * 100_000, "max_tokens": 1, "truncate_prompt_tokens": 5})
    require_few_values(body)
