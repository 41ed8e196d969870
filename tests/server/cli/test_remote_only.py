"""Configs of remote models alone are served and run without torch, which takes seconds and hundreds of MB."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.api.conftest import CHAT, host, live_server, surface  # noqa: F401  fixtures

NOTE_MODULES = """
import atexit, sys
from ensemble_server.server.cli.app import main
heavy = {"torch", "transformers", "sentence_transformers", "llguidance"}
atexit.register(lambda: print("heavy:", *sorted(heavy & set(sys.modules)), file=sys.stderr, flush=True))
sys.argv[0] = "ensemble"
main()
"""


@pytest.fixture
async def config(host, tmp_path: Path) -> AsyncIterator[Path]:  # noqa: F811
    async with live_server(host()) as url:
        far = {"url": f"{url}/v1", "model": "hello"}
        models = {
            "far": far,
            "major": {"method": "majority", "members": ["far"], "samples": 3, "answer": "text"},
            "crowd": {"method": "crowd_vote", "members": {"far": 2}, "similarity": {"rouge_l_word": 1}},
            "talk": {"method": "exchange_of_thought", "members": ["far", "major"], "answer": "text"},
            "fused": {"method": "answer_fusion", "members": ["far", "major"], "aggregator": "far"},
            "routed": {"method": "routing", "members": {"far": {"positive_prompts": ["a"]}}, "top_k": 1},
        }
        file = tmp_path / "c.yaml"
        file.write_text(json.dumps({"models": models, "server": {"port": 0}}), encoding="utf-8")
        yield file


@asynccontextmanager
async def ensemble(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-c", NOTE_MODULES, *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.slow
async def test_a_server_of_remote_models_does_without_torch(config: Path) -> None:
    async with ensemble("serve", config) as server:
        assert server.stdout is not None
        ready = ""
        while not ready.startswith("Ready: "):
            ready = (await server.stdout.readline()).decode()
            assert ready, (await server.communicate())[1].decode()
        async with httpx.AsyncClient(base_url=ready.split()[1], timeout=60) as client:
            for model in ("far", "major", "crowd", "talk"):
                answer = await client.post("chat/completions", json=CHAT | {"model": model})
                assert answer.status_code == 200, answer.text
            assert (await client.get("../health")).status_code == 200
        server.send_signal(signal.SIGINT)
        _, said = await server.communicate()
    assert said.decode().splitlines()[-1] == "heavy:"
    assert server.returncode == 0


@pytest.mark.slow
async def test_a_batch_over_remote_models_does_without_torch(config: Path) -> None:
    rows = config.with_name("rows.jsonl")
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": CHAT | {"model": name}}
        for name in ("far", "major", "crowd", "talk")
    ]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    async with ensemble("batch", rows, "-o", config.with_name("out.jsonl"), "-c", config) as batch:
        _, said = await batch.communicate()
    assert (batch.returncode, said.decode().splitlines()[-1]) == (0, "heavy:"), said.decode()
