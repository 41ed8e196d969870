"""Connections that send nothing or half a request end, slow bodies are refused, and what is read at once is bounded."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.exceptions import HTTPException

from ensemble_server.server.api import arrival
from ensemble_server.server.api.arrival import Bodies, timely
from ensemble_server.server.api.serve import MAX_DESCRIPTORS, raise_descriptor_limit
from ensemble_server.server.engines.scripted_engine import Script
from tests.server.api.conftest import CHAT, asgi_client, live_server

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-"
WHOLE = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def received(url: str, *sent: bytes) -> bytes:
    """All that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    answered = b""
    try:
        async with asyncio.timeout(10):
            for piece in sent:
                writer.write(piece)
                answered += await reader.readuntil(b"}") if piece == WHOLE else b""
            return answered + await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("sent", [(), (HALF,), (WHOLE, HALF)], ids=["nothing", "half a head", "half a second head"])
async def test_a_connection_that_does_not_come_to_the_end_of_a_head_is_closed(host, monkeypatch, sent):
    monkeypatch.setattr(arrival, "HEAD_S", 0.3)
    async with live_server(host()) as url:
        answered = await received(url, *sent)
    assert answered.count(b"HTTP/1.1 200") == (WHOLE in sent)


async def test_a_connection_that_waits_for_its_answer_is_not_closed(host, monkeypatch):
    monkeypatch.setattr(arrival, "HEAD_S", 0.05)
    slow = Script(("a", "b"), delay_s=0.2)
    async with live_server(host(m=slow)) as url, httpx.AsyncClient() as client:
        assert (await client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code == 200


async def pieces(*, num: int, pause_s: float) -> AsyncIterator[bytes]:
    for _ in range(num):
        await asyncio.sleep(pause_s)
        yield b"x" * 10


async def test_a_body_may_be_slow_as_long_as_it_comes(monkeypatch):
    monkeypatch.setattr(arrival, "GRACE_S", 0.2)
    monkeypatch.setattr(arrival, "MIN_BYTES_PER_S", 100)
    assert [piece async for piece in timely(pieces(num=8, pause_s=0.03))] == [b"x" * 10] * 8
    monkeypatch.setattr(arrival, "MIN_BYTES_PER_S", 100_000)
    with pytest.raises(HTTPException) as refused:
        async for _ in timely(pieces(num=1000, pause_s=0.03)):
            pass
    assert refused.value.status_code == 408


async def test_half_a_body_is_a_408_and_the_end_of_the_connection(host, monkeypatch):
    monkeypatch.setattr(arrival, "GRACE_S", 0.2)
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json", "content-length: 99"]
    async with live_server(host()) as url:
        answered = await received(url, "\r\n".join([*lines, "", '{"prompt"']).encode())
    assert answered.startswith(b"HTTP/1.1 408") and b"request_timeout" in answered


async def test_what_is_read_at_once_is_bounded_over_all_bodies():
    bodies = Bodies(max_bytes=100)
    with bodies.reading() as one, bodies.reading() as other:
        one(60)
        other(40)
        with pytest.raises(HTTPException) as refused:
            other(1)
        assert refused.value.status_code == 503
    with bodies.reading() as later:
        later(100)


async def test_too_much_at_once_is_a_503_that_says_when_to_come_back(host):
    async with asgi_client(host()) as client:
        object.__setattr__(client.app.state.context, "bodies", Bodies(max_bytes=10))
        response = await client.post("/v1/completions", json={"prompt": "x" * 100})
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")


def test_descriptors_are_raised_as_far_as_the_system_lets_them():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        raise_descriptor_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == (MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
