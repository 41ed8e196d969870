"""A live server in a process of its own, over tiny real models, as clients meet it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from filelock import FileLock

from ensemble_server.server.engines.scripted_engine import ScriptedModel
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.weights.view import Surface
from tests.clients.tool_loop import weather
from tests.conftest import CHAT_TEMPLATE, ENGINES
from tests.server.api.conftest import live_server, tokenizer

NODE_FOLDER = Path(__file__).parent / "node"
CONFIG = """
models:
  llama: {{path: "{llama}"}}
  deep: {{path: "{deep}"}}
  red: {{base: llama, adapter: "{red}"}}
  mix: {{method: probability_average, members: {{llama: 1, deep: 2, red: 1}}}}
  adaptive: {{method: probability_average, members: [llama, deep, red], pool: posterior, share: 0.01}}
server: {{port: 0, max_queue: 64}}
engine: {engine}
"""


@dataclass(frozen=True)
class LiveServer:
    url: str  # without /v1
    process: subprocess.Popen


@pytest.fixture(scope="session")
def live(engine: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("live")
    config = folder / "config.yaml"
    block = ENGINES[engine] | {"max_context": 512}
    config.write_text(CONFIG.format(engine=json.dumps(block), **folders))
    with server_of(config) as server:
        yield server


@contextmanager
def server_of(config: Path, *arguments: str) -> Iterator[LiveServer]:
    """A server in a process of its own; its log lies beside the config. It is stopped in an orderly way."""
    log = config.with_suffix(".log")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with log.open("w") as output:
        command = [sys.executable, "-m", "ensemble_server", "serve", str(config), *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield LiveServer(_address(process, log), process)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(process: subprocess.Popen, log: Path) -> str:
    """The address that the server prints once it is ready."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("Ready: "):
                url = line.split()[1].removesuffix("/v1")
                assert httpx.get(f"{url}/health").status_code == 200
                return url
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


# --- clients of Node.js --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """The folder with what its package-lock.json names. npm fetches it once, for all processes of a run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node.js and npm")
    installed, lock = NODE_FOLDER / "node_modules" / ".package-lock.json", NODE_FOLDER / "package-lock.json"
    with FileLock(NODE_FOLDER / "node_modules.lock"):  # two that install into one folder delete each other's files
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
            finished = subprocess.run(command, cwd=NODE_FOLDER, capture_output=True, text=True, timeout=300)
            if finished.returncode != 0:
                pytest.skip(f"npm cannot fetch the clients: {finished.stderr[-300:]}")
    return NODE_FOLDER


# --- a scripted model that calls a tool ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    template = CHAT_TEMPLATE + "{% if tools %}<tool_call></tool_call>{% endif %}{{ tool_calls }}"
    return Surface(tokenizer(tmp_path_factory.mktemp("agents")), chat_template=template)


@pytest.fixture
def model(surface: Surface) -> ScriptedModel:
    return ScriptedModel("far", weather, surface=surface, max_model_len=4096)


@pytest_asyncio.fixture
async def url(model: ScriptedModel, surface: Surface, tmp_path: Path) -> AsyncIterator[str]:
    hosting = ScriptedHosting({"far": model}, {"far": surface}, tmp_path / "batches")
    async with live_server(hosting) as address:
        yield f"{address}/v1"
