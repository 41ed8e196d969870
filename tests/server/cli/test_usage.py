from __future__ import annotations

import asyncio
import json

import httpx
from typer.testing import CliRunner

from ensemble_server.server.cli.app import app
from tests.server.api.conftest import CHAT, host, live_server, surface  # noqa: F401  fixtures

TEAM = {"authorization": "Bearer team-key"}


async def test_every_key_is_shown_by_its_name_with_what_it_has_used(host, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SOME_KEY", "team-key")
    hosting = host()
    config = type(hosting.config.server).model_validate({"keys": {"team": {"key": "team-key"}}, "api_keys": ["idle"]})
    hosting.change("server", keys=config.keys, api_keys=config.api_keys)
    async with live_server(hosting) as url:
        async with httpx.AsyncClient(base_url=url, headers=TEAM, trust_env=False) as client:
            for _ in range(2):
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        run = CliRunner().invoke
        shown = await asyncio.to_thread(run, app, ["usage", f"{url}/v1", "--api-key-env", "SOME_KEY", "--json"])
        table = await asyncio.to_thread(run, app, ["usage", url, "--api-key-env", "SOME_KEY"])
        refused = await asyncio.to_thread(run, app, ["usage", url])
    used = json.loads(shown.output)
    assert set(used) == {"team", "key-1"}
    assert (used["team"]["requests"], used["team"]["completion"]) == (2, 8)
    assert used["key-1"] == dict.fromkeys(used["key-1"], 0)
    assert "team" in table.output and "team-key" not in table.output + shown.output
    assert "answered 401; give --api-key-env" in str(refused.exception)


def test_a_server_that_is_not_there_is_named():
    told = CliRunner().invoke(app, ["usage", "http://127.0.0.1:9"])
    assert "no server answers at http://127.0.0.1:9/metrics" in str(told.exception)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    told = CliRunner().invoke(app, ["usage", "--api-key-env", "NOT_SET"])
    assert "NOT_SET, which is not set" in str(told.exception)
