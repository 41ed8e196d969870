"""What HTTP costs: concurrent streams against a live server, interleaved with the same work on the engine alone.

The server runs in a process of its own (as users run it), the engine in this one; only one of the two works at a time.
Reports TTFT and inter-token latency (p50, p99) as a client sees them, tokens per second, and HTTP / engine as the
median of the ratios within each repeat.

    python -m benchmarks.http [--config configs/demo.yaml] [--model mix] [--repeats 5] [--tokens 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx

from ensemble_server.ensembles.base import Delta, GenerationRequest, Sampling
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.hosting import Hosting

CONCURRENCIES = (1, 4, 16)
QUESTION = "Tell me about the history of computing, part {}."


@dataclass
class Stream:
    """Times of one stream, in seconds: to the first token, between tokens, and in all."""

    ttft: float
    gaps: list[float]
    num_tokens: int


async def timed(deltas: AsyncIterator[int]) -> Stream:
    """Time an iterator that yields the number of new tokens at each piece."""
    started = previous = time.perf_counter()
    ttft, gaps, num_tokens = 0.0, [], 0
    async for num_new in deltas:
        now = time.perf_counter()
        if not num_tokens:
            ttft = now - started
        else:
            gaps.append(now - previous)
        num_tokens += num_new
        previous = now
    return Stream(ttft, gaps, num_tokens)


async def over_http(client: httpx.AsyncClient, model: str, index: int, num_tokens: int) -> AsyncIterator[int]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION.format(index)}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    seen = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            usage = json.loads(line[6:]).get("usage")
            if usage and usage["completion_tokens"] > seen:
                yield usage["completion_tokens"] - seen
                seen = usage["completion_tokens"]


async def in_process(hosting: Hosting, model: str, index: int, num_tokens: int) -> AsyncIterator[int]:
    request = GenerationRequest(
        messages=({"role": "user", "content": QUESTION.format(index)},),
        sampling=Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True),
    )
    async for event in hosting.models[model].generate(request):
        if isinstance(event, Delta) and event.token_ids:
            yield len(event.token_ids)


async def together(streams: Sequence[AsyncIterator[int]]) -> tuple[float, list[Stream]]:
    """-> tokens per second over all, and each stream's times"""
    started = time.perf_counter()
    done = await asyncio.gather(*(timed(stream) for stream in streams))
    return sum(stream.num_tokens for stream in done) / (time.perf_counter() - started), done


@asynccontextmanager
async def live_server(config: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with live([sys.executable, "-m", "ensemble_server", "serve", str(config)]) as client:
        yield client


@asynccontextmanager
async def live(command: Sequence[str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server that `command` starts on a free port, once its /health says 200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}; run: {' '.join(command)}")
                try:
                    if (await client.get("/health")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


async def run(options: argparse.Namespace) -> dict:
    results = {}
    async with Hosting.open(load_config(options.config)) as hosting, live_server(options.config) as client:
        for n in options.streams:
            speeds: dict[str, list[float]] = {"http": [], "engine": []}
            streams: list[Stream] = []
            for repeat in range(options.repeats + 1):
                for arm in random.sample(["http", "engine"], 2):
                    if arm == "http":
                        work = [over_http(client, options.model, i, options.tokens) for i in range(n)]
                    else:
                        work = [in_process(hosting, options.model, i, options.tokens) for i in range(n)]
                    speed, done = await together(work)
                    if repeat == 0:
                        continue  # warm-up
                    speeds[arm].append(speed)
                    streams += done if arm == "http" else []
            gaps = [gap * 1e3 for stream in streams for gap in stream.gaps]
            ttfts = [stream.ttft * 1e3 for stream in streams]
            ratios = [http / engine for http, engine in zip(speeds["http"], speeds["engine"], strict=True)]
            results[str(n)] = row = {
                "http_tokens_per_s": statistics.median(speeds["http"]),
                "engine_tokens_per_s": statistics.median(speeds["engine"]),
                "http_against_engine": statistics.median(ratios),
                "http_against_engine_spread": [min(ratios), max(ratios)],
                "ttft_ms": {"p50": percentile(ttfts, 50), "p99": percentile(ttfts, 99)},
                "inter_token_ms": {"p50": percentile(gaps, 50), "p99": percentile(gaps, 99)},
            }
            print(
                f"{n:2d} streams: {row['http_tokens_per_s']:6.1f} tokens/s over HTTP, "
                f"{row['http_against_engine']:.2f}x the engine alone; "
                f"TTFT p50 {row['ttft_ms']['p50']:.0f} ms, p99 {row['ttft_ms']['p99']:.0f} ms; "
                f"between tokens p50 {row['inter_token_ms']['p50']:.0f} ms, p99 {row['inter_token_ms']['p99']:.0f} ms",
                flush=True,
            )
            if options.json:  # after each: an end in the middle leaves what is done
                options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "demo.yaml")
    parser.add_argument("--model", default="mix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=list(CONCURRENCIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
