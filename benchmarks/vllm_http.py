"""Our server on vLLM against vLLM's own server, and against our server on its transformers engine.

All serve the same ensemble (three LoRA members on one base) with the same limits, each in processes of its own; one
works at a time, in a new order in every repeat. Reports tokens per second of concurrent streams, and ratios as the
median over the repeats. Prompts differ, and prefix caches are off.

    python -m benchmarks.vllm_http [--repeats 5] [--tokens 64] [--concurrencies 1 16] [--arms ...] [--json FILE]

Needs the environment of `make vllm-env`: .venv-vllm/bin/python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from benchmarks.http import live, over_http, together
from benchmarks.subjects import Subject
from benchmarks.vllm import directory_of, members_of

MAX_BATCH, MAX_CONTEXT = 16, 1024
ENGINES: dict[str, dict[str, Any]] = {
    "ours on vLLM": {
        "kind": "vllm",
        "kv_cache_gb": 1,
        "prefix_caching": False,
        "options": {"enforce_eager": True},
    },
    "ours on transformers": {"kind": "transformers", "prefix_cache_mb": 0},
}
ARMS = ("vLLM's own", *ENGINES)


def command_of(arm: str, root: Path) -> list[str]:
    """How to start the server of an arm, less its port. Writes what it reads into `root`."""
    if arm not in ENGINES:
        limits = ["--max-num-seqs", str(MAX_BATCH), "--max-model-len", str(MAX_CONTEXT)]
        same = ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--served-model-name", "mix"]
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        return [*server, "--model", str(directory_of("adapters", root, Subject())), *limits, *same]
    models = members_of("adapters", root, Subject())
    mix = {"method": "probability_average", "members": [name for name in models if name != "base"]}
    config = {
        "models": {**models, "base": {**models["base"], "dtype": "float32", "listed": False}, "mix": mix},
        "engine": {**ENGINES[arm], "max_batch": MAX_BATCH, "max_context": MAX_CONTEXT},
    }
    file = root / f"{arm}.yaml"
    file.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "ensemble_server", "serve", str(file)]


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """`arm@concurrency` -> tokens per second, one per repeat. A first, shorter round warms up."""
    speeds: dict[str, list[float]] = {f"{arm}@{n}": [] for n in options.concurrencies for arm in options.arms}
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients = {arm: await stack.enter_async_context(live(command_of(arm, root))) for arm in options.arms}
        order = [(arm, n) for arm in options.arms for n in options.concurrencies]
        for repeat in range(options.repeats + 1):
            random.shuffle(order)
            for arm, n in order:
                num_tokens = options.tokens if repeat else 4
                speed, _ = await together([over_http(clients[arm], "mix", i, num_tokens) for i in range(n)])
                print(f"{arm}@{n}: {speed:.1f} tokens/s for {num_tokens} tokens each", file=sys.stderr, flush=True)
                if repeat:
                    speeds[f"{arm}@{n}"].append(speed)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrencies", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    speeds = asyncio.run(measure(options))
    first = options.arms[0]
    print(f"| server | streams | tokens/s | against {first} |\n| --- | --- | --- | --- |")
    for n in options.concurrencies:
        for arm in options.arms:
            ratios = [a / b for a, b in zip(speeds[f"{arm}@{n}"], speeds[f"{first}@{n}"], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {arm} | {n} | {statistics.median(speeds[f'{arm}@{n}']):.1f} | {spread} |")
    if options.json:
        options.json.write_text(json.dumps(speeds, indent=2) + "\n")


if __name__ == "__main__":
    main()
