"""What a server keeps in memory of clients that behave badly: requests that are cancelled, hung up on and turned away.

The server runs in a process of its own, with random tiny weights unless a config is given, a prefix cache of 16 MB and
a queue of 8. Clients ask for chats and completions of all lengths, for several choices, grammars and log-probabilities,
and leave at any moment. Every so many requests all is quiet, and the process's resident memory is read. It should stop
growing: reported is the growth per 1,000 requests over the last half.

    python -m benchmarks.storm [--config FILE] [--requests 7000] [--every 500] [--minutes 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import yaml

from benchmarks.http import live

CLIENTS = 24
TEXT = "the quick brown fox jumps over a lazy dog and then def f of x returns one"
WORDS = TEXT.split()


def tiny_model(folder: Path) -> Path:
    """A random causal LM of two layers with a tokenizer of bytes, saved into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_of(folder: Path) -> Path:
    models = {
        "a": {"path": str(tiny_model(folder / "a"))},
        "b": {"path": str(folder / "a"), "system_prompt": "Be brief."},
        "mix": {"method": "probability_average", "members": ["a", "b"], "pool": "posterior"},
    }
    file = folder / "config.yaml"
    engine = {"prefix_cache_mb": 16, "max_context": 1024, "max_batch": 16}
    file.write_text(yaml.safe_dump({"models": models, "engine": engine, "server": {"max_queue": 8}}))
    return file


def request(numbers: random.Random, models: list[str]) -> tuple[str, dict[str, Any]]:
    """A path and a body, of any kind."""
    text = " ".join(numbers.choices(WORDS, k=int(2 ** numbers.uniform(0, 7))))
    body: dict[str, Any] = {
        "model": numbers.choice(models),
        "max_tokens": int(2 ** numbers.uniform(0, 6)),
        "temperature": 1,
        "n": numbers.choice([1, 1, 1, 2, 5]),
        "stream": numbers.random() < 0.6,
        "ensemble": {"explain": numbers.random() < 0.2},
    }
    if numbers.random() < 0.2:
        body["stop"] = [numbers.choice(WORDS), "x" * numbers.randint(1, 200)]
    if numbers.random() < 0.2:
        body["structured_outputs"] = {"regex": f"[a-z ]{{1,{numbers.randint(1, 300)}}}"}
    if numbers.random() < 0.5:
        return "/v1/completions", body | {"prompt": text, "logprobs": 3 if numbers.random() < 0.2 else None}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def client_of(client: httpx.AsyncClient, numbers: random.Random, models: list[str], turns: asyncio.Queue) -> None:
    while not turns.empty():
        turns.get_nowait()
        path, body = request(numbers, models)
        patience_s = numbers.choice([60, 60, 0.01, 0.05, 0.2])
        try:
            async with asyncio.timeout(patience_s), client.stream("POST", path, json=body) as response:
                num_lines = numbers.choice([10**6, 10**6, 1, 5])
                async for _ in response.aiter_lines():
                    num_lines -= 1
                    if not num_lines:
                        break
        except (TimeoutError, httpx.TransportError):
            pass


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def pid_of(client: httpx.AsyncClient) -> int:
    """Of the process that listens where `client` asks."""
    import psutil

    port = client.base_url.port
    return next(
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("inet"))
    )


async def run(options: argparse.Namespace, config: Path) -> dict[str, Any]:
    numbers = random.Random(options.seed)
    seen: list[tuple[int, float]] = []
    async with live([sys.executable, "-m", "ensemble_server", "serve", str(config)]) as client:
        models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        pid, started = pid_of(client), time.monotonic()
        seen.append((0, rss_mb(pid)))
        print(f"{0:6} requests {seen[-1][1]:8.1f} MB", flush=True)
        while seen[-1][0] < options.requests and time.monotonic() - started < 60 * options.minutes:
            turns: asyncio.Queue[int] = asyncio.Queue()
            for number in range(options.every):
                turns.put_nowait(number)
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as stormy:
                await asyncio.gather(*(client_of(stormy, numbers, models, turns) for _ in range(CLIENTS)))
            while "ensemble:num_requests_running 0.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.1)
            seen.append((seen[-1][0] + options.every, rss_mb(pid)))
            print(f"{seen[-1][0]:6} requests {seen[-1][1]:8.1f} MB {time.monotonic() - started:7.0f} s", flush=True)
    half = [entry for entry in seen if 2 * entry[0] >= seen[-1][0]]
    growth = (half[-1][1] - half[0][1]) / max(1, half[-1][0] - half[0][0]) * 1000
    print(f"over the last half: {growth:+.1f} MB per 1,000 requests")
    return {"rss_mb": seen, "mb_per_1000_requests": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="default: two views of one tiny random model, and their average")
    parser.add_argument("--requests", type=int, default=7000)
    parser.add_argument("--every", type=int, default=500, help="requests between two readings")
    parser.add_argument("--minutes", type=float, default=60, help="stop at the first reading after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(run(options, options.config or config_of(Path(folder))))
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
