"""The AI SDK (npm), with its provider for OpenAI-compatible servers, through a tool loop of two steps."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ensemble_server.server.engines.scripted_engine import ScriptedModel
from tests.clients.tool_loop import assert_was_a_loop

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_tool_loop(way: str, node_packages: Path, url: str, model: ScriptedModel) -> None:
    process = await asyncio.create_subprocess_exec(
        "node",
        "agents/ai_sdk.mjs",
        url,
        way,
        cwd=node_packages,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode == 0, errors.decode()
    told = json.loads(out)
    assert told["text"] == "It will be rainy in Oslo."
    assert (told["steps"], told["calls"]) == (2, [{"toolName": "weather", "input": {"city": "Oslo"}}])
    assert told["finishReasons"] == ["tool-calls", "stop"]
    assert_was_a_loop(model)
