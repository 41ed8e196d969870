"""The nginx config that ships, in a real nginx, before a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ensemble_server.ensembles.base import Delta, Done, MemberUsage, PromptScored, Usage
from tests.server.api.conftest import host, live_server, surface, until  # noqa: F401  fixtures among them

pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIG = Path(__file__).parents[2] / "deploy" / "nginx" / "ensemble-server.conf"
NAME = "llm.example.com"
KEY = {"authorization": "Bearer secret"}


class StepByStep:
    """Says a token each time `next` is set."""

    name = "steps"
    members = ("steps",)
    max_model_len = 1000
    explains_tokens = False
    fan_out = False

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.next = asyncio.Semaphore(0)
        self.num_live = 0

    async def generate(self, request):
        self.num_live += 1
        try:
            yield PromptScored((1,))
            for place in range(self.num_tokens):
                await self.next.acquire()
                reason = "stop" if place == self.num_tokens - 1 else None
                yield Delta(0, f" {place}", (place,), finish_reason=reason)
            yield Done(Usage(1, self.num_tokens, {"steps": MemberUsage(1, self.num_tokens)}), "scripted", ("steps",), 1)
        finally:
            self.num_live -= 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def nginx(upstream: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The shipped config with this machine's ports and a certificate of its own; a client that goes through it."""
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip("needs nginx and openssl (Debian: apt-get install nginx-light openssl)")
    port = free_port()
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}",
         "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    site = CONFIG.read_text()
    for ours, here in (
        ("127.0.0.1:8000", upstream.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        (f"/etc/ssl/certs/{NAME}.pem", str(certificate)),
        (f"/etc/ssl/private/{NAME}.key", str(key)),
    ):
        assert ours in site
        site = site.replace(ours, here)
    whole = folder / "nginx.conf"
    whole.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n{site} }}\n"
    )
    checked = subprocess.run([NGINX, "-t", "-c", whole], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    process = await asyncio.create_subprocess_exec(NGINX, "-c", str(whole))
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        base = f"https://127.0.0.1:{port}"
        async with httpx.AsyncClient(
            base_url=base, verify=context, headers={"host": NAME} | KEY, timeout=120, trust_env=False
        ) as client:
            client.event_hooks["request"].append(_names_the_host)
            await until(lambda: _listens(port), timeout_s=20)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def _names_the_host(request: httpx.Request) -> None:
    request.extensions["sni_hostname"] = NAME


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_streams_arrive_token_by_token(host, tmp_path):  # noqa: F811
    model = StepByStep(20)
    async with live_server(host({"api_keys": ("secret",)}, steps=model)) as url, nginx(url, tmp_path) as client:
        body = {"model": "steps", "messages": [{"role": "user", "content": "count"}], "stream": True}
        seen = 0
        model.next.release()
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if re.search(r'"content":" \d+"', line):
                    seen += 1
                    model.next.release()  # the next token is said only once this one has been heard
        assert seen == 20


async def test_who_hangs_up_at_nginx_is_gone_from_the_server(host, tmp_path):  # noqa: F811
    model = StepByStep(20)
    async with live_server(host({"api_keys": ("secret",)}, steps=model)) as url, nginx(url, tmp_path) as client:
        body = {"model": "steps", "messages": [{"role": "user", "content": "count"}], "stream": True}
        model.next.release()
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if "content" in line:
                    break
            assert model.num_live == 1
        await until(lambda: model.num_live == 0, timeout_s=30)


async def test_an_upload_of_100_mb_comes_through_whole(host, tmp_path):  # noqa: F811
    async with live_server(host({"api_keys": ("secret",)})) as url, nginx(url, tmp_path) as client:
        line = b'{"custom_id": "%08d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "%s"}}\n'
        content = b"".join(line % (number, b"x" * 900) for number in range(100_000))
        assert len(content) > 95 * 1000**2
        stored = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", content)})
        assert stored.status_code == 200, stored.text
        assert stored.json()["bytes"] == len(content)
        back = await client.get(f"/v1/files/{stored.json()['id']}/content")
        assert back.content == content


async def test_the_page_comes_through_and_metrics_do_not(host, tmp_path):  # noqa: F811
    async with live_server(host({"api_keys": ("secret",)})) as url, nginx(url, tmp_path) as client:
        assert "<title>" in (await client.get("/", headers={"accept": "text/html"})).text
        assert (await client.get("/metrics")).status_code == 404


@asynccontextmanager
async def served(config: Path, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """`ensemble serve`, a process of its own, once it answers; killed at the end of the block if it still lives."""
    command = [sys.executable, "-m", "ensemble_server", "serve", config, "--port", str(port)]
    log = config.with_name(f"server-{time.monotonic_ns()}.log")
    with log.open("wb") as written:
        process = await asyncio.create_subprocess_exec(*map(str, command), stdout=written, stderr=written)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            async with asyncio.timeout(180):
                while not await _is_ready(client):
                    assert process.returncode is None, log.read_text()
                    await asyncio.sleep(0.1)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["asked to stop", "killed"])
async def test_the_server_behind_it_is_restarted_and_no_row_of_a_batch_is_lost(tiny, tmp_path, end):
    port, num_rows = free_port(), 60
    config = tmp_path / "config.yaml"
    models = {"base": {"path": str(tiny["llama"]), "dtype": "float32"}}
    block = {"api_keys": ["secret"], "shutdown_timeout_s": 5}
    config.write_text(yaml.safe_dump({"models": models, "server": block, "engine": {"max_batch": 2}}))
    body = {"model": "base", "prompt": "def f", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    rows = [
        {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions", "body": body | {"seed": number}}
        for number in range(num_rows)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()

    async def state() -> dict[str, Any]:
        return (await client.get(f"/v1/batches/{batch_id}")).json()

    async with nginx(f"http://127.0.0.1:{port}", tmp_path) as client:
        async with served(config, port) as process:
            file = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", content)})
            asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
            batch_id = (await client.post("/v1/batches", json=asked)).json()["id"]
            async with asyncio.timeout(120):
                while not (await state())["request_counts"]["completed"]:
                    await asyncio.sleep(0.02)
            process.send_signal(end)
            await process.wait()
        down = await client.get(f"/v1/batches/{batch_id}")
        assert down.status_code == 502, "nginx says that nobody is there"
        async with served(config, port):
            before = (await state())["request_counts"]
            async with asyncio.timeout(180):
                while (at := await state())["status"] != "completed":
                    await asyncio.sleep(0.1)
            written = (await client.get(f"/v1/files/{at['output_file_id']}/content")).text
    answered = [json.loads(line) for line in written.splitlines()]
    assert 0 < before["completed"] < num_rows, "it was stopped in the middle"
    assert sorted(one["custom_id"] for one in answered) == sorted(row["custom_id"] for row in rows)
    assert {one["response"]["status_code"] for one in answered} == {200}
