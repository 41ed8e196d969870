"""How long bodies that are made to hold others up delay /health and another stream's next token.

    python -m benchmarks.hostile [--seconds 2] [--rounds 5] [--only "messages"]

One process serves a scripted model that gives a token every 10 ms (no engine, so that all delay is HTTP's), another one
listens to a stream and asks for /health every 10 ms, a third one sends hostile bodies, one kind after the other. Each
kind is measured in rounds of two windows of equal length, one at rest and one beside the bodies, in turns which comes
first; so whatever else the machine does falls on both. Of each window counts the longest gap between two tokens beyond
the 10 ms, and the longest answer of /health. Printed: the median of the rounds, and in brackets the longest of all, at
rest and beside; then how many kinds stay within the goal, which is a median beside of at most 100 ms more than at rest.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import httpx

CHAT = {"messages": [{"role": "user", "content": "x"}], "stream": True}
JSON = {"content-type": "application/json"}
TOKEN_S = 0.01
GOAL_S = 0.1
SETTLE_S = 0.1  # what a held-up token or answer needs to be seen
MB = 10**6


def chat(rest: bytes) -> bytes:
    return b'{"max_tokens":1,"messages":[{"role":"user","content":"x"}],' + rest + b"}"


def messages(number: int, message: bytes) -> bytes:
    return b'{"messages":[' + b",".join([message] * number) + b'],"max_tokens":1}'


BODIES: dict[str, Callable[[], bytes]] = {
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
    "400,000 token ids": lambda: b'{"prompt":[' + b",".join([b"7"] * 400_000) + b'],"max_tokens":1}',
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
            gc.collect()
            gc.freeze()  # as `ensemble serve` does once all is loaded
            await asyncio.sleep(3600)

    asyncio.run(run())


@dataclass
class Gauge:
    """The longest delays since they were last taken, in seconds."""

    token: float = 0.0
    health: float = 0.0

    def take(self) -> Gauge:
        taken = Gauge(self.token, self.health)
        self.token = self.health = 0.0
        return taken


@dataclass
class Measured:
    """The longest delays of each window."""

    rest: list[Gauge]
    beside: list[Gauge]
    num_sent: int = 0


async def measure(url: str, orders: Connection, *, seconds: float, rounds: int) -> Measured:
    """What the bodies that `orders` sends do to others, beside what happens at rest."""
    gauge, has_begun, measured = Gauge(), asyncio.Event(), Measured([], [])
    async with httpx.AsyncClient(base_url=url, timeout=300, verify=False) as client:

        async def listen() -> None:
            async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
                last: float | None = None
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        now = time.perf_counter()
                        gauge.token = max(gauge.token, now - last - TOKEN_S if last else 0.0)
                        last = now
                        has_begun.set()

        async def ask() -> None:
            await has_begun.wait()
            while True:
                began = time.perf_counter()
                await client.get("/health")
                gauge.health = max(gauge.health, time.perf_counter() - began)
                await asyncio.sleep(TOKEN_S)

        async def window(*, sends: bool) -> None:
            await asyncio.sleep(SETTLE_S)
            gauge.take()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                if sends:
                    orders.send("send")
                    while not orders.poll():
                        await asyncio.sleep(0.005)
                    orders.recv()
                    measured.num_sent += 1
                await asyncio.sleep(SETTLE_S)
            (measured.beside if sends else measured.rest).append(gauge.take())

        watching = [asyncio.create_task(listen()), asyncio.create_task(ask())]
        await has_begun.wait()
        for number in range(rounds):
            for sends in (False, True) if number % 2 == 0 else (True, False):
                await window(sends=sends)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return measured


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
    parser.add_argument("--seconds", type=float, default=2.0, help="of each window")
    parser.add_argument("--rounds", type=int, default=5, help="for each kind of body: two windows each")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds with this in their name")
    options = parser.parse_args()
    kinds = [name for name in BODIES if options.only in name]
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
        heads = ("tokens at rest", "beside", "/health at rest", "beside")
        print(f"{'ms: median (longest)':36}{''.join(f'{head:>18}' for head in heads)}  sent")
        num_within = 0
        for name in kinds:
            orders.send(name)
            orders.recv()
            measured = asyncio.run(measure(url, orders, seconds=options.seconds, rounds=options.rounds))
            shown = [
                [getattr(window, what) for window in windows]
                for what in ("token", "health")
                for windows in (measured.rest, measured.beside)
            ]
            num_within += all(median(beside) - median(rest) <= GOAL_S for rest, beside in (shown[:2], shown[2:]))
            cells = [f"{1000 * median(found):.0f} ({1000 * max(found):.0f})" for found in shown]
            print(f"{name:36}{''.join(f'{cell:>18}' for cell in cells)}  {measured.num_sent}", flush=True)
        print(f"{num_within} of {len(kinds)} kinds stay within {1000 * GOAL_S:.0f} ms beyond rest, by the medians")
        sender.kill()
        server.kill()


if __name__ == "__main__":
    main()
