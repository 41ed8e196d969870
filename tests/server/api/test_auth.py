from __future__ import annotations

import hashlib

import openai
import pytest

from ensemble_server.server.api.auth import OPEN_PATHS
from ensemble_server.server.config.blocks import ServerConfig
from ensemble_server.server.limits.keys import configured_keys
from tests.server.api.conftest import CHAT, asgi_client, live_server

KEYS = {"api_keys": ("first", "schlüssel")}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer  first "},
        {"authorization": "Bearer schlüssel".encode()},
        {"x-api-key": "first"},
    ],
)
async def test_a_key_opens_the_door(host, headers):
    async with asgi_client(host(KEYS)) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": "first"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer first,schlüssel".encode()},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/tokenizer_info", "/nothing", "/health/"])
async def test_without_one_everything_else_is_a_401(host, headers, path):
    async with asgi_client(host(KEYS)) as client:
        response = await client.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_open_paths_need_no_key(host, path):
    async with asgi_client(host(KEYS)) as client:
        assert (await client.get(path)).status_code == 200


async def test_a_refused_body_is_not_even_read(host):
    async with asgi_client(host(KEYS)) as client:
        response = await client.post("/v1/chat/completions", content=b"not json")
    assert response.status_code == 401


async def test_without_keys_the_server_is_open(host):
    async with asgi_client(host()) as client:
        assert (await client.get("/v1/models")).status_code == 200


def test_keys_come_from_the_config_and_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEYS", "a, b ,,c")
    assert configured_keys(ServerConfig(api_keys_env="SOME_KEYS", api_keys=("d",))) == ["d", "a", "b", "c"]


def test_an_empty_environment_variable_opens_the_server_and_says_so(monkeypatch, caplog):
    monkeypatch.delenv("SOME_KEYS", raising=False)
    assert configured_keys(ServerConfig(api_keys_env="SOME_KEYS")) == []
    assert "SOME_KEYS holds no key" in caplog.text


async def test_the_openai_client_raises_its_own_error(host):
    async with live_server(host(KEYS)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="not valid"):
                await client.chat.completions.create(model="hello", **CHAT)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="first") as client:
            answer = await client.chat.completions.create(model="hello", **CHAT)
    assert answer.choices[0].message.content == "Hello world"


async def test_preflights_pass_without_a_key_and_refusals_can_be_read_by_the_page(host):
    origin = {"origin": "https://page.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with asgi_client(host(KEYS | {"cors_origins": ("https://page.example",)})) as client:
        preflight = await client.options("/v1/chat/completions", headers=origin | asked)
        refused = await client.post("/v1/chat/completions", json=CHAT, headers=origin)
        stranger = await client.get("/health", headers={"origin": "https://other.example"})
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in stranger.headers


async def test_cors_is_off_unless_configured(host):
    async with asgi_client(host()) as client:
        response = await client.get("/health", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_a_config_may_hold_the_digest_of_a_key_in_its_place(host):
    digest = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
    async with asgi_client(host({"api_keys": (digest, "sha256:plain")})) as client:
        for key, status in (("secret", 200), (digest, 401), ("sha256:plain", 200)):
            answer = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status, key
