"""Secrets planted in every place where a config can hold them are in no answer, log line, metric, file or page."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from ensemble_server.server.api.app import create_app
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.server.api.conftest import CHAT

SECRETS = {
    "user": "planted-user",
    "password": "planted-password",
    "token": "planted-token",
    "member_key": "sk-planted-member",
    "api_key": "sk-planted-client",
    "other_api_key": "sk-planted-in-env",
}


@pytest.fixture
def dead_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Nobody listens at port 9, so that every way of failing is taken."""
    monkeypatch.setenv("MEMBER_KEY", SECRETS["member_key"])
    monkeypatch.setenv("CLIENT_KEYS", SECRETS["other_api_key"])
    address = "http://{user}:{password}@127.0.0.1:9/v1?token={token}".format(**SECRETS)
    remote = {"url": address, "api_key_env": "MEMBER_KEY", "max_retries": 0}
    return {
        "models": {
            "far": remote,
            "other": remote,
            "crowd": {"method": "crowd_vote", "members": ["far", "other"], "similarity": {"rouge_l_word": 1}},
        },
        "server": {"api_keys": [SECRETS["api_key"]], "api_keys_env": "CLIENT_KEYS"},
        "batch": {"folder": str(tmp_path / "batches")},
    }


async def test_no_secret_of_a_config_is_told(
    dead_members: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = parse_config(dead_members, source=tmp_path / "config.yaml")
    told = []
    async with Hosting.open(config) as hosting:
        app = create_app(hosting, metrics=Metrics())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {SECRETS['api_key']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            for path in ("/", "/v1/models", "/v1/models/far", "/health", "/metrics", "/version", "/openapi.json"):
                told.append((path, (await client.get(path)).text))
            for model in ("far", "crowd", "nobody"):
                for more in ({}, {"stream": True}, {"ensemble": {"explain": True}}, {"n": 2}):
                    response = await client.post("/v1/chat/completions", json=CHAT | {"model": model} | more)
                    told.append((f"{model} {more}", response.text + str(response.headers)))
            wrong = await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
            told.append(("a wrong key", wrong.text))
    told.append(("the log", caplog.text))
    told += [(str(file), file.read_bytes().decode(errors="replace")) for file in tmp_path.rglob("*") if file.is_file()]
    leaks = [(place, name) for place, text in told for name, secret in SECRETS.items() if secret in text]
    assert not leaks
    assert any("502" in text or "member_failed" in text or "turnout" in text for _, text in told)
