"""Ctrl-C in real processes: while models are loaded, which never ends here, and beside an answer that never ends. Who
ends has given them up, whatever the clock says.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.engines.remote.scripted_remote import Connection, ScriptedRemote

PATIENCE_S = 120  # of a machine under load
ENDLESS = """
import sys, threading
import ensemble_server.server.hosting as hosting
from ensemble_server.server.cli.app import main

def load_for_ever(config):
    print("loading", flush=True)
    threading.Event().wait()

hosting.rehearse = load_for_ever
sys.argv[0] = "ensemble"
main()
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    models = {"slow": {"url": "http://127.0.0.1:9/v1"}, "vote": {"method": "majority", "members": ["slow"]}}
    file.write_text(json.dumps({"models": models, "server": {"port": 0}}), encoding="utf-8")
    return file


@contextmanager
def loading(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`ensemble ARGUMENTS`, as soon as it is loading."""
    command = [sys.executable, "-c", ENDLESS, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "loading\n" in iter(process.stdout.readline, ""), process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_that_loads(config: Path, number: signal.Signals) -> None:
    with loading("serve", config) as server:
        server.send_signal(number)
        _, said = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, "Traceback" in said) == (0, False), said


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--residency", "sequential")])
def test_ctrl_c_ends_a_batch_that_loads_and_keeps_its_job(config: Path, options: tuple[str, ...]) -> None:
    rows, output = config.with_name("rows.jsonl"), config.with_name("answers.jsonl")
    body = {"model": "vote", "messages": [{"role": "user", "content": "x"}]}
    rows.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    with loading("batch", rows, "-o", output, "-c", config, *options) as batch:
        batch.send_signal(signal.SIGINT)
        _, said = batch.communicate(timeout=PATIENCE_S)
    assert batch.returncode == 130, said
    assert "the same command continues" in said and "Traceback" not in said
    assert output.with_name("answers.jsonl.job").exists()


@pytest.mark.slow
async def test_a_second_signal_ends_a_server_beside_a_live_answer(tmp_path: Path) -> None:
    async def begin_and_stall(connection: Connection) -> None:
        await connection.start_stream()
        await connection.event({"choices": [{"index": 0, "delta": {"content": "It is "}}]})
        await connection.gone.wait()

    async with ScriptedRemote([begin_and_stall]) as remote:
        file = tmp_path / "c.yaml"
        server = {"port": 0, "shutdown_timeout_s": 10 * PATIENCE_S}
        file.write_text(json.dumps({"models": {"far": {"url": remote.url}}, "server": server}), encoding="utf-8")
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "ensemble_server", "serve", str(file)]
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        try:
            assert process.stdout is not None and process.stderr is not None
            ready = await line_with("Ready: ", process.stdout)
            body = {"model": "far", "messages": [{"role": "user", "content": "x"}], "stream": True}
            async with (
                httpx.AsyncClient(base_url=ready.split()[1], timeout=PATIENCE_S) as client,
                client.stream("POST", "chat/completions", json=body) as response,
            ):
                lines = response.aiter_lines()
                while "It is" not in await anext(lines):
                    pass
                process.send_signal(signal.SIGINT)
                await line_with("stopping: live requests have", process.stderr)
                assert process.returncode is None
                process.send_signal(signal.SIGINT)
                assert "shutting down" in "".join([line async for line in lines])
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def line_with(text: str, stream: asyncio.StreamReader) -> str:
    while text not in (line := (await stream.readline()).decode()):
        assert line, "it ended before"
    return line
