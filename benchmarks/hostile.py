"""How long bodies that are made to hold others up delay /health and another stream's next token.

    python -m benchmarks.hostile [--seconds 3]

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
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

CHAT = {"messages": [{"role": "user", "content": "x"}], "stream": True}
JSON = {"content-type": "application/json"}
TOKEN_S = 0.01
MB = 10**6


def chat(rest: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"x"}],' + rest + b"}"


def messages(number: int, message: bytes) -> bytes:
    return b'{"messages":[' + b",".join([message] * number) + b"]}"


BODIES: dict[str, Callable[[], bytes]] = {
    "nothing": bytes,
    "1.2 million wrong messages, 15 MB": lambda: messages(1_200_000, b'{"role":""}'),
    "100,000 wrong messages": lambda: messages(100_000, b'{"role":""}'),
    "480,000 right messages, 14 MB": lambda: messages(480_000, b'{"role":"user","content":"x"}'),
    "16,000 right messages": lambda: messages(16_000, b'{"role":"user","content":"x"}'),
    "900,000 wrong biases": lambda: chat(b'"logit_bias":{' + b",".join(b'"%d":"x"' % n for n in range(900_000)) + b"}"),
    "60,000 right biases": lambda: chat(b'"logit_bias":{' + b",".join(b'"%d":1' % n for n in range(60_000)) + b"}"),
    "200,000 unknown names": lambda: chat(b",".join(b'"x%d":1' % n for n in range(200_000))),
    "a text of 15 MB": lambda: messages(1, b'{"role":"user","content":"' + b"x" * 15 * MB + b'"}'),
    "a text of 7 million quotes": lambda: b'{"messages":"' + b'\\"' * 7 * MB + b'"}',
    "7 million brackets": lambda: b'{"messages":' + b"[" * 7 * MB,
    "400,000 token ids": lambda: b'{"prompt":[' + b",".join([b"7"] * 400_000) + b"]}",
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


async def measure(url: str, name: str, orders: Connection, seconds: float) -> tuple[float, float, int]:
    """(longest gap of the stream beyond TOKEN_S, longest /health, bodies answered), seconds."""
    gap = slowest = 0.0
    num_sent = 0
    has_begun = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=300, verify=False) as client:

        async def listen() -> None:
            nonlocal gap
            async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
                last: float | None = None
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        now = time.perf_counter()
                        gap = max(gap, now - last - TOKEN_S if last else 0.0)
                        last = now
                        has_begun.set()

        async def ask() -> None:
            nonlocal slowest
            await has_begun.wait()
            while True:
                began = time.perf_counter()
                await client.get("/health")
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(TOKEN_S)

        watching = [asyncio.create_task(listen()), asyncio.create_task(ask())]
        await has_begun.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            if name != "nothing":
                orders.send("send")
                while not orders.poll():
                    await asyncio.sleep(0.005)
                orders.recv()
                num_sent += 1
            await asyncio.sleep(0.1)  # what a held-up token or answer needs to be seen
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return gap, slowest, num_sent


def send(url: str, orders: Connection) -> None:
    """In a process of its own, so that sending holds up neither the listener nor its clock. Orders: the name of the
    body to make, or to send the one that was made."""
    body, path = b"", ""
    with httpx.Client(base_url=url, timeout=300) as client:
        while True:
            order = orders.recv()
            if order == "send":
                with client.stream("POST", path, content=body, headers=JSON) as response:
                    next(response.iter_bytes(), b"")
            else:
                body = BODIES[order]()
                path = "/v1/completions" if b'"prompt"' in body[:20] else "/v1/chat/completions"
            orders.send("done")


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
        orders, other_end = multiprocessing.Pipe()
        sender = multiprocessing.get_context("spawn").Process(target=send, args=(url, other_end), daemon=True)
        sender.start()
        print(f"{'body':36} {'token ms':>9} {'health ms':>9} {'sent':>5}")
        for name in BODIES:
            orders.send(name)
            orders.recv()
            gap, slowest, num_sent = asyncio.run(measure(url, name, orders, seconds))
            print(f"{name:36} {1000 * gap:9.0f} {1000 * slowest:9.0f} {num_sent:5}", flush=True)
        sender.kill()
        server.kill()


if __name__ == "__main__":
    main()
