"""Secrets planted in every place a config can hold them are in no answer, no log line, no metric and no page."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import CHAT, asgi_client

PLANTED = {
    "user of the URL": "planted-user",
    "password of the URL": "planted-password",
    "query of the URL": "planted-query",
    "key of the remote": "planted-remote-key",
    "key of clients": "planted-client-key",
}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PLANTED_KEY", PLANTED["key of the remote"])
    user, password, query = (PLANTED[f"{part} of the URL"] for part in ("user", "password", "query"))
    url = f"http://{user}:{password}@127.0.0.1:9/v1?token={query}"  # nobody listens there
    far = {"url": url, "model": "m", "api_key_env": "PLANTED_KEY", "max_retries": 0}
    models = {
        "far": far,
        "crowd": {"method": "crowd_vote", "members": {"far": 2}, "similarity": {"rouge_l_word": 1}},
    }
    server = {"api_keys": [PLANTED["key of clients"]], "log_level": "debug"}
    return parse_config({"models": models, "server": server}, source=tmp_path / "config.yaml")


async def test_secrets_of_the_config_are_said_nowhere(config, caplog):
    caplog.set_level(logging.DEBUG)
    for chatty in ("httpx", "httpcore"):  # as the server has them
        logging.getLogger(chatty).setLevel(logging.WARNING)
    said: list[str] = [repr(config)]
    async with Hosting.open(config) as hosting, asgi_client(hosting) as client:
        for headers in ({"authorization": f"Bearer {PLANTED['key of clients']}"}, {"authorization": "Bearer wrong"}):
            for path in ("/v1/models", "/v1/models/far", "/health", "/metrics", "/openapi.json", "/", "/docs"):
                said.append((await client.get(path, headers=headers)).text)
            for model in ("far", "crowd"):
                for more in ({}, {"stream": True}, {"ensemble": {"explain": True}}):
                    answer = await client.post(
                        "/v1/chat/completions", json=CHAT | {"model": model} | more, headers=headers
                    )
                    said.append(answer.text + str(answer.headers))
            classified = await client.post(
                "/v1/classify", json={"model": "far", "prompt": "x", "labels": ["a", "b"]}, headers=headers
            )
            said.append(classified.text)
    said += [record.getMessage() + str(record.exc_text) + str(record.__dict__) for record in caplog.records]
    assert any("far" in text for text in said)
    leaked = {place for place, secret in PLANTED.items() for text in said if secret in text}
    assert not leaked
