"""The AI SDK (npm), with its provider for OpenAI-compatible servers, through a tool loop of two steps."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ensemble_server.server.engines.scripted_engine import ScriptedModel
from tests.clients.tool_loop import assert_was_a_loop

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).with_name("ai_sdk")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the lock file names."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node.js and npm, which are not here")
    folder = tmp_path_factory.mktemp("ai_sdk") / "app"
    shutil.copytree(SOURCES, folder)
    command = ["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm has no registry here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_tool_loop(way: str, installed: Path, url: str, model: ScriptedModel) -> None:
    process = await asyncio.create_subprocess_exec(
        "node", "agent.mjs", url, way, cwd=installed, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode == 0, errors.decode()
    told = json.loads(out)
    assert told["text"] == "It will be rainy in Oslo."
    assert (told["steps"], told["calls"]) == (2, [{"toolName": "weather", "input": {"city": "Oslo"}}])
    assert told["finishReasons"] == ["tool-calls", "stop"]
    assert_was_a_loop(model)
