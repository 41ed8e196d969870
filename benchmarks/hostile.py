"""How long bodies that are made to hold others up delay /health and another stream's next token.

    python -P benchmarks/hostile.py [--seconds 3]

One process serves a scripted model that gives a token every 10 ms (no engine, so that all delay is HTTP's), another one
listens to a stream and asks for /health every 10 ms while hostile bodies arrive, one kind after the other. Printed: the
longest gap between two tokens beyond the 10 ms, and the longest answer of /health, for each kind and with none.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import tempfile
import time
from pathlib import Path

import httpx
import orjson

CHAT = {"messages": [{"role": "user", "content": "x"}], "stream": True}
JSON = {"content-type": "application/json"}
TOKEN_S = 0.01
MB = 10**6


def bodies() -> dict[str, bytes]:
    def chat(rest: bytes) -> bytes:
        return b'{"messages":[{"role":"user","content":"x"}],' + rest + b"}"

    return {
        "nothing": b"",
        "1.2 million wrong messages, 15 MB": b'{"messages":[' + b",".join([b'{"role":""}'] * 1_200_000) + b"]}",
        "100,000 wrong messages": b'{"messages":[' + b",".join([b'{"role":""}'] * 100_000) + b"]}",
        "480,000 right messages, 14 MB": b'{"messages":['
        + b",".join([b'{"role":"user","content":"x"}'] * 480_000)
        + b"]}",
        "16,000 right messages": b'{"messages":[' + b",".join([b'{"role":"user","content":"x"}'] * 16_000) + b"]}",
        "900,000 wrong biases": chat(b'"logit_bias":{' + b",".join(b'"%d":"x"' % n for n in range(900_000)) + b"}"),
        "60,000 right biases": chat(b'"logit_bias":{' + b",".join(b'"%d":1' % n for n in range(60_000)) + b"}"),
        "200,000 unknown names": chat(b",".join(b'"x%d":1' % n for n in range(200_000))),
        "a text of 15 MB": orjson.dumps({"messages": [{"role": "user", "content": "x" * 15 * MB}]}),
        "a text of 7 million quotes": b'{"messages":"' + b'\\"' * 7 * MB + b'"}',
        "7 million brackets": b'{"messages":' + b"[" * 7 * MB,
        "400,000 token ids": b'{"prompt":[' + b",".join([b"7"] * 400_000) + b"]}",
    }


def serve(port: int, folder: str) -> None:
    from ensemble_server.server.api.app import create_app
    from ensemble_server.server.api.serve import listening
    from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
    from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
    from ensemble_server.server.metrics import Metrics

    async def run() -> None:
        model = ScriptedModel("m", Script(("a",) * 100_000, delay_s=TOKEN_S))
        hosting = ScriptedHosting({"m": model}, {}, Path(folder))
        config = hosting.config.server.model_copy(update={"port": port})
        async with listening(create_app(hosting, metrics=Metrics()), config):
            await asyncio.sleep(3600)

    asyncio.run(run())


async def measure(url: str, body: bytes, seconds: float) -> tuple[float, float, int]:
    """(longest gap of the stream beyond TOKEN_S, longest /health, bodies answered), seconds."""
    gap = slowest = 0.0
    num_sent = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        end = time.perf_counter() + seconds

        async def listen() -> None:
            nonlocal gap
            async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
                last: float | None = None
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        now = time.perf_counter()
                        gap = max(gap, now - last - TOKEN_S if last else 0.0)
                        last = now

        async def ask() -> None:
            nonlocal slowest
            while True:
                began = time.perf_counter()
                await client.get("/health")
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(TOKEN_S)

        watching = [asyncio.create_task(listen()), asyncio.create_task(ask())]
        while time.perf_counter() < end:
            if body:
                path = "/v1/completions" if b'"prompt"' in body[:20] else "/v1/chat/completions"
                await _send(url, path, body)
                num_sent += 1
            else:
                await asyncio.sleep(0.1)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return gap, slowest, num_sent


async def _send(url: str, path: str, body: bytes) -> None:
    """From a process of its own, so that sending holds up neither the listener nor its clock."""
    sender = multiprocessing.get_context("spawn").Process(target=_post, args=(url + path, body))
    sender.start()
    while sender.is_alive():
        await asyncio.sleep(0.005)


def _post(url: str, body: bytes) -> None:
    with httpx.Client(timeout=120) as client, client.stream("POST", url, content=body, headers=JSON) as response:
        next(response.iter_bytes(), b"")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each kind of body")
    seconds = parser.parse_args().seconds
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, folder), daemon=True)
        server.start()
        while True:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        print(f"{'body':36} {'token ms':>9} {'health ms':>9} {'sent':>5}")
        for name, body in bodies().items():
            gap, slowest, num_sent = asyncio.run(measure(url, body, seconds))
            print(f"{name:36} {1000 * gap:9.0f} {1000 * slowest:9.0f} {num_sent:5}", flush=True)
        server.kill()


if __name__ == "__main__":
    main()
