"""What is not JSON, not UTF-8, too deep or too large is the client's error and never the server's."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.json_body import parse_json
from tests.server.api.conftest import CHAT, asgi_client, live_server, until

JSON = {"content-type": "application/json"}
USER = b'{"messages": [{"role": "user", "content": %s}]%s}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"null",
        b"[]",
        b"[1, 2]",
        b'"text"',
        USER % (b'"hi"', b', "temperature": NaN'),
        USER % (b'"hi"', b', "temperature": Infinity'),
        USER % (b'"hi"', b', "temperature": 1e999'),
        USER % (b'"hi"', b', "ensemble": {"weights": {"a": 1e999}}'),
        USER % (b'"\xff\xfe"', b""),
        USER % (b'"\\ud800"', b""),
        USER % (b"[" * 100_000 + b"]" * 100_000, b""),
        USER % (b'"hi"', b', "max_tokens": ' + b"9" * 5000),
        USER % (b'"hi"', b', "max_tokens": ' + b"9" * 100),
        USER % (b'"hi"', b', "seed": 9223372036854775808'),
        USER % (b'"hi"', b', "n": 1.5'),
        USER % (b'"hi"', b', "n": true'),
        USER % (b'"hi"', b', "n": "1"'),
        USER % (b'"hi"', b"} trailing"),
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
async def test_a_wrong_body_is_a_400_in_openais_shape(host, body):
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_deep_json_that_is_within_bounds_harms_nobody(host):
    deep = b"[" * 150 + b"]" * 150
    async with asgi_client(host()) as client:
        response = await client.post(
            "/v1/chat/completions", content=USER % (b'"hi"', b', "unknown": ' + deep), headers=JSON
        )
    assert response.status_code == 200


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml"])
async def test_a_body_that_does_not_say_json_is_a_415(host, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", content=USER % (b'"hi"', b""), headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


async def test_a_byte_order_mark_is_no_part_of_a_body(host):
    body = json.dumps(CHAT)
    headers = {"content-type": "application/json"}
    async with asgi_client(host()) as client:
        for data, status in ((body.encode("utf-8-sig"), 200), (body.encode("utf-16"), 400)):
            answer = await client.post("/v1/chat/completions", content=data, headers=headers)
            assert answer.status_code == status, answer.text
    assert "UTF-16; send JSON as UTF-8" in answer.json()["error"]["message"]


async def test_a_packed_body_is_told_as_one(host):
    data = gzip.compress(json.dumps(CHAT).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    async with asgi_client(host()) as client:
        answer = await client.post("/v1/chat/completions", content=data, headers=headers)
    assert answer.status_code == 415
    assert "packed (gzip)" in answer.json()["error"]["message"]


async def test_a_charset_behind_the_content_type_is_fine(host):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", content=USER % (b'"hi"', b""), headers=headers)
    assert response.status_code == 200


async def test_a_body_that_is_too_large_is_a_413_that_its_sender_gets_to_see(host):
    """Over a real connection: the sender is still sending when the limit is passed."""
    import httpx

    large = CHAT | {"user": "x" * 300_000}
    async with live_server(host({"max_body_bytes": 100_000})) as url, httpx.AsyncClient(base_url=url) as client:
        refused = await client.post("/v1/chat/completions", json=large)
        accepted = await client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    assert "100000" in refused.json()["error"]["message"]
    assert accepted.status_code == 200


async def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server(host, caplog):
    caplog.set_level(logging.INFO)
    async with live_server(host()) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 100\r\n\r\n{{".encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: any(record.name == "ensemble.access" for record in caplog.records))
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert [record.fields["status"] for record in caplog.records if record.name == "ensemble.access"] == [499]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_request_error(body):
    try:
        parse_json(body)
    except RequestError as exc:
        assert "not valid JSON" in str(exc) or "send JSON as UTF-8" in str(exc)
