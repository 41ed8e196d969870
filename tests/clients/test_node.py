"""The official clients of Node.js, each by a script in node/ that checks what it gets. npm fetches them once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.clients.conftest import NODE_FOLDER
from tests.clients.scripted import scripted_server
from tests.docs.snippets import ROOT, Snippet, snippets

EXAMPLES = [snippet for snippet in snippets(ROOT / "docs" / "clients.md") if snippet.language == "js"]
SCRIPTS = sorted(script.name for script in NODE_FOLDER.glob("*.mjs"))


@pytest_asyncio.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    async with scripted_server(tmp_path) as url:
        yield url


async def said(url: str, *arguments: str) -> str:
    """What node prints. Fails the test if it fails."""
    process = await asyncio.create_subprocess_exec(
        "node",
        *arguments,
        cwd=NODE_FOLDER,
        env=os.environ | {"SERVER": url, "NO_PROXY": "127.0.0.1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-4000:]
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
async def test_what_a_client_of_node_gets_is_what_it_expects(node_packages: Path, url: str, script: str) -> None:
    assert (await said(url, script)).splitlines()[-1] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
async def test_an_example_of_the_docs_runs_as_it_stands(node_packages: Path, url: str, example: Snippet) -> None:
    assert "http://127.0.0.1:8000" in example.text
    code = example.text.replace("http://127.0.0.1:8000", url)
    assert "Hello world" in await said(url, "--input-type=module", "--eval", code)
