"""A real Prometheus scrapes a server under load, with the config that ships: no panel and no alert asks in vain."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import httpx
import pytest
import yaml

from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.deploy.test_behind_nginx import free_port
from tests.deploy.test_files import DASHBOARD, DEPLOY, RULES

pytestmark = pytest.mark.slow

PROMETHEUS = shutil.which("prometheus")
ASKED = {"messages": [{"role": "user", "content": "def f(x): return?"}], "max_tokens": 8, "ignore_eos": True}
STAGES = ("queue", "prefill", "decode", "answer", "vote")
KEYS = {"busy": {"key": "busy-key"}, "limited": {"key": "limited-key", "requests_per_minute": 1}}
EMPTY_WHILE_ALL_IS_WELL = {"EnsembleServerDown", "EnsembleServerErrors", "EnsembleServerTurnsAway"}


def expressions() -> dict[str, str]:
    """What panels and alerts ask; of alerts the left side of the comparison, which must be there to be compared."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {f"{panel['title']} {t['refId']}": t["expr"] for panel in panels for t in panel["targets"]}
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        if rule["alert"] not in EMPTY_WHILE_ALL_IS_WELL:
            asked[rule["alert"]] = rule["expr"].rpartition(" > ")[0]
    asked |= {f"stage {stage}": f'ensemble:stage_duration_seconds_count{{stage="{stage}"}} > 0' for stage in STAGES}
    asked["turnout"] = 'ensemble:members_silent_total{model="crowd"} / ensemble:members_asked_total{model="crowd"} > 0'
    asked["KV bytes at work"] = "max_over_time(ensemble:kv_cache_bytes[5m]) > 0"
    return {name: text.replace("$__rate_interval", "1m") for name, text in asked.items()}


async def test_no_panel_stays_empty(tiny, tmp_path, monkeypatch):
    if PROMETHEUS is None:
        pytest.skip("needs Prometheus (Debian: apt-get install prometheus)")
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    models = {
        "base": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "mix": {"method": "probability_average", "members": ["base", "red"]},
        "away": {"url": "http://127.0.0.1:9/v1", "model": "nobody", "max_retries": 0},
        "crowd": {"method": "crowd_vote", "members": ["mix", "away"]},
    }
    server = {"max_body_bytes": 4000, "keys": KEYS}
    config = parse_config({"models": models, "server": server}, source=tmp_path / "config.yaml")
    metrics = Metrics()
    async with Hosting.open(config, on_step=metrics.observe_step) as hosting:
        app = create_app(hosting, metrics=metrics)
        free = config.server.model_copy(update={"port": 0})
        async with (
            listening(app, free) as port,
            app.state.batches.running(),
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                headers={"authorization": "Bearer busy-key"},
                timeout=120,
                trust_env=False,
            ) as client,
        ):
            load = asyncio.create_task(keep_busy(client))
            try:
                empty = await asked_in_vain(f"127.0.0.1:{port}", tmp_path, load)
            finally:
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
    assert empty == set()


async def keep_busy(client: httpx.AsyncClient) -> None:
    while True:
        for model in ("mix", "base", "crowd"):
            answer = await client.post("/v1/chat/completions", json=ASKED | {"model": model})
            assert answer.status_code == 200, answer.text
        streamed = await client.post("/v1/chat/completions", json=ASKED | {"model": "mix", "stream": True})
        assert streamed.status_code == 200
        limited = {"authorization": "Bearer limited-key"}
        refused = await client.post("/v1/completions", json={"model": "base", "prompt": "x"}, headers=limited)
        assert refused.status_code in (200, 429)
        too_long = await client.post("/v1/completions", json={"model": "base", "prompt": "x" * 5000})
        assert too_long.status_code == 413


async def asked_in_vain(server: str, folder: Path, load: asyncio.Task[None]) -> set[str]:
    """The expressions that Prometheus has no number for after two minutes."""
    scraped = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    scraped["global"]["scrape_interval"] = "1s"
    scraped["scrape_configs"][0]["authorization"] = {"credentials": "busy-key"}
    scraped["rule_files"] = [str(RULES)]
    scraped["scrape_configs"][0]["static_configs"][0]["targets"] = [server]
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(scraped))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(PROMETHEUS), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error", env=os.environ,
    )  # fmt: skip
    waiting = expressions()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as asking:
            for _ in range(120):
                if load.done():
                    load.result()
                waiting = {name: text for name, text in waiting.items() if not await has_number(asking, text)}
                if not waiting:
                    break
                await asyncio.sleep(1)
    finally:
        process.terminate()
        await process.wait()
    return set(waiting)


async def has_number(asking: httpx.AsyncClient, expression: str) -> bool:
    try:
        answer = await asking.get("/api/v1/query", params={"query": expression})
    except httpx.TransportError:  # it is still starting
        return False
    if answer.status_code == 503:  # it listens, and is not ready yet: said as plain text
        return False
    found = answer.json()
    assert found["status"] != "error", found
    results = found.get("data", {}).get("result", [])
    return any(result["value"][1] != "NaN" for result in results)
