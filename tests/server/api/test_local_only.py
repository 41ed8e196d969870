from __future__ import annotations

import socket

import httpx
import pytest
from starlette.responses import Response

from ensemble_server.server.api.local_only import LocalOnly, local_only
from ensemble_server.server.config.blocks import ServerConfig
from tests.server.api.conftest import CHAT, live_server

BODY = CHAT | {"model": "hello"}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "api.localhost", "127.1.2.3"])
async def test_this_machines_names_are_answered(host, name):
    async with live_server(host()) as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/v1/models", headers={"host": f"{name}:8000"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "", "[", "::1"]
)
async def test_a_name_that_was_bent_to_this_machine_is_refused(host, name):
    async with live_server(host()) as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/v1/models", headers={"host": name})
    assert answer.status_code == 403
    assert "has no keys" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "http://localhost@evil.example"]
)
async def test_pages_of_other_sites_may_not_send(host, origin):
    async with live_server(host()) as url, httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/chat/completions", json=BODY, headers={"origin": origin})
        assert answer.status_code == 403
        assert "server.cors_origins" in answer.json()["error"]["message"]
        assert (await client.get(f"{url}/v1/models", headers={"origin": origin})).status_code == 200


async def test_our_own_page_and_programs_may_send(host):
    async with live_server(host()) as url, httpx.AsyncClient() as client:
        for headers in ({}, {"origin": url}):
            answer = await client.post(f"{url}/v1/chat/completions", json=BODY, headers=headers)
            assert answer.status_code == 200, answer.text


async def test_origins_of_the_config_may_send_and_be_hosts(host):
    async with live_server(host({"cors_origins": ("https://friend.example",)})) as url, httpx.AsyncClient() as client:
        headers = {"origin": "https://friend.example", "host": "friend.example"}
        answer = await client.post(f"{url}/v1/chat/completions", json=BODY, headers=headers)
    assert answer.status_code == 200


def test_where_keys_or_a_network_guard_the_door_hosts_are_not_asked(monkeypatch):
    async def app(scope, receive, send): ...

    monkeypatch.setenv("SOME_KEYS", "a")
    assert isinstance(local_only(app, "::1", ServerConfig()), LocalOnly)
    assert local_only(app, "10.0.0.1", ServerConfig()) is app
    assert local_only(app, "0.0.0.0", ServerConfig(api_keys=("a",))) is app
    assert local_only(app, "127.0.0.1", ServerConfig(api_keys=("a",))) is app
    assert local_only(app, "127.0.0.1", ServerConfig(api_keys_env="SOME_KEYS")) is app
    assert local_only(app, "127.0.0.1", ServerConfig(cors_origins=("*",))) is app
    assert isinstance(local_only(app, "127.0.0.1", ServerConfig(api_keys_env="NO_SUCH_KEYS")), LocalOnly)


@pytest.mark.parametrize(
    ("client", "name", "origin", "status"),
    [
        ("127.0.0.1", "localhost:8000", None, 200),
        ("127.0.0.1", "10.0.0.7:8000", None, 200),
        ("127.0.0.1", f"{socket.gethostname()}:8000", None, 200),
        ("127.0.0.1", "evil.example", None, 403),
        ("::1", "evil.example", None, 403),
        ("::ffff:127.0.0.1", "evil.example", None, 403),
        ("127.0.0.1", "localhost:8000", "https://evil.example", 403),
        ("10.0.0.7", "evil.example", None, 200),
        ("10.0.0.7", "gpu-box", "https://evil.example", 200),
    ],
)
async def test_a_server_without_keys_on_all_addresses_is_guarded_where_pages_of_this_machine_come_from(
    client, name, origin, status
):
    async def app(scope, receive, send):
        await Response()(scope, receive, send)

    guarded = local_only(app, "0.0.0.0", ServerConfig())
    transport = httpx.ASGITransport(guarded, client=(client, 50000))
    headers = {"host": name} | ({"origin": origin} if origin else {})
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as asking:
        answer = await asking.post("/v1/models", headers=headers)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "https://localhost", "http://127.0.0.1:1", "http://[::1]:80"]
)
async def test_pages_of_this_machine_may_ask_unless_origins_are_named(host, origin):
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    async with live_server(host()) as url, httpx.AsyncClient() as client:
        allowed = await client.options(f"{url}/v1/chat/completions", headers=preflight)
        answer = await client.post(f"{url}/v1/chat/completions", json=BODY, headers={"origin": origin})
    assert (allowed.status_code, answer.status_code) == (200, 200)
    assert allowed.headers["access-control-allow-origin"] == answer.headers["access-control-allow-origin"] == origin
    async with live_server(host({"cors_origins": ("https://friend.example",)})) as url, httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/chat/completions", json=BODY, headers={"origin": origin})
    assert answer.status_code == 403


async def test_pages_of_strangers_are_not_told_that_they_may_read(host):
    for server in ({}, {"api_keys": ("key",)}):
        async with live_server(host(server)) as url, httpx.AsyncClient() as client:
            answer = await client.get(f"{url}/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
