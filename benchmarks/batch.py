"""Batches: rows per second against the two ways that people go without them, a user's wait beside one, and its memory.

Speed: word problems behind eight worked examples (`benchmarks.batch_rows`), all of one length, greedy, by

- batch: the runner on the engine in this process;
- http: a client of 16 threads that sends the same rows to `ensemble serve` in a process of its own;
- plain: `transformers` generate in batches of 16, padded on the left, once per member of the ensemble with the same
  model; in a process of its own, on its first --plain-rows rows, since its rows per second do not depend on how many
  batches there are.

All arms run in every repeat, in a new order each time, and only one works at a time; ratios are taken within a repeat.
In every timed run the shared beginning is new to the engine. --only latency: time to the first token of a user who
streams while a batch is running, against an idle server (`benchmarks.batch_latency`). --only memory: peak memory of
jobs of different sizes (`benchmarks.batch_memory`).

    python -m benchmarks.batch [--config configs/demo.yaml] [--model mix] [--rows 300] [--tokens 64] [--repeats 3]
                               [--plain-rows 16] [--questions 20] [--sizes 1000 10000 100000]
                               [--only speed | latency | memory] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx

from benchmarks import batch_latency, batch_memory
from benchmarks.batch_rows import chat_body, prompts
from benchmarks.http import live_server
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.running.runner import run
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

CLIENT_THREADS = 16
PLAIN_BATCH = 16
PLAIN_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


async def batch_rows_per_s(hosting: Hosting, bodies: list[dict[str, Any]]) -> float:
    started = time.perf_counter()
    rows = (Row(index, str(index), "/v1/chat/completions", body) for index, body in enumerate(bodies))
    with (
        tempfile.TemporaryDirectory() as folder,
        JobStore.open(Path(folder) / "answers.job", Identity({})) as store,
    ):
        store.take_rows(rows)
        summary = await run(store, hosting)
        assert summary.counts.ok == len(bodies), f"{summary.counts.failed} rows failed"
    return len(bodies) / (time.perf_counter() - started)


def http_rows_per_s(address: httpx.URL, bodies: list[dict[str, Any]]) -> float:
    with httpx.Client(base_url=address, timeout=3600) as client, ThreadPoolExecutor(CLIENT_THREADS) as threads:
        started = time.perf_counter()
        for response in threads.map(lambda body: client.post("/v1/chat/completions", json=body), bodies):
            response.raise_for_status()
        return len(bodies) / (time.perf_counter() - started)


def serve_plain(questions: Connection, num_members: int, num_tokens: int) -> None:
    """A process: for each list of prompts that comes, generate for all of them, once per member; answers rows/s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = resolve_checkpoint(PLAIN_MODEL, relative_to=Path())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def generate(texts: list[str]) -> None:
        chats = [[{"role": "user", "content": text}] for text in texts]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens)

    while (texts := questions.recv()) is not None:
        started = time.perf_counter()
        for _ in range(num_members):
            for begin in range(0, len(texts), PLAIN_BATCH):
                generate(texts[begin : begin + PLAIN_BATCH])
        questions.send(len(texts) / (time.perf_counter() - started))


@contextmanager
def plain(num_members: int, num_tokens: int) -> Iterator[Callable[[list[str]], float]]:
    """A function from prompts to rows per second."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_plain, args=(theirs, num_members, num_tokens))
    process.start()

    def rows_per_s(texts: list[str]) -> float:
        ours.send(texts)
        return ours.recv()

    try:
        yield rows_per_s
    finally:
        ours.send(None)
        process.join()


async def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"batch": [], "http": [], "plain": []}
    async with Hosting.open(load_config(options.config)) as hosting, live_server(options.config) as client:
        num_members = len(hosting.models[options.model].members)
        with plain(num_members, options.tokens) as plain_rows_per_s:

            def bodies(salt: str) -> list[dict[str, Any]]:
                texts = prompts(options.rows, salt)
                return [chat_body(options.model, text, options.tokens) for text in texts]

            arms: dict[str, Callable[[str], Awaitable[float]]] = {
                "batch": lambda salt: batch_rows_per_s(hosting, bodies(salt)),
                "http": lambda salt: asyncio.to_thread(http_rows_per_s, client.base_url, bodies(salt)),
                "plain": lambda salt: asyncio.to_thread(plain_rows_per_s, prompts(options.plain_rows, salt)),
            }
            warm_up = [chat_body(options.model, "Hello.", 2)]
            await batch_rows_per_s(hosting, warm_up)
            await asyncio.to_thread(http_rows_per_s, client.base_url, warm_up)
            await asyncio.to_thread(plain_rows_per_s, ["Hello."])
            for repeat in range(options.repeats):
                for arm in random.sample(list(arms), len(arms)):
                    speeds[arm].append(await arms[arm](f"{arm} {repeat}"))
                print(", ".join(f"{arm} {speeds[arm][-1]:.3f} rows/s" for arm in arms), flush=True)
    return speed_report(options, num_members, speeds)


def speed_report(options: argparse.Namespace, num_members: int, speeds: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(against: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds["batch"], speeds[against], strict=True))

    result = {
        "rows_per_s": {arm: statistics.median(values) for arm, values in speeds.items()},
        "against_http": ratio("http"),
        "against_plain": ratio("plain"),
    }
    print(
        f"{options.rows} rows, {options.tokens} new tokens, {options.model} of {num_members} members: batch "
        f"{result['rows_per_s']['batch']:.3f} rows/s, {result['against_http']:.2f}x a client of {CLIENT_THREADS} "
        f"threads, {result['against_plain']:.2f}x plain generate in batches of {PLAIN_BATCH}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "demo.yaml")
    parser.add_argument("--model", default="mix")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-rows", type=int, default=PLAIN_BATCH)
    parser.add_argument("--questions", type=int, default=20, help="of a user, per repeat, idle and beside the batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="rows of a job")
    parser.add_argument("--only", choices=["speed", "latency", "memory"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.only in (None, "speed"):
        results["speed"] = asyncio.run(measure_speed(options))
    if options.only in (None, "latency"):
        results["latency"] = asyncio.run(batch_latency.measure(options))
    if options.only in (None, "memory"):
        results["peak_mb"] = batch_memory.measure(options.sizes)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
