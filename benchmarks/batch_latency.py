"""How long a user waits for the first token while a batch fills the engine, against an idle engine. All over HTTP: the
batch is a file of rows at /v1/batches, the user streams a chat."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.batch_rows import chat_body, prompts
from benchmarks.http import live_server, over_http, percentile, timed

ANSWER_TOKENS = 4  # of a user's question: it is the first that counts
PAUSE_S = 0.5  # between questions at most: they arrive at any moment of a step


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token, idle and beside a batch; idle and busy phases take turns."""
    ttft: dict[str, list[float]] = {"idle": [], "busy": []}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        async with live_server(_with_batches(options.config, Path(folder))) as client:
            await _questions(client, options.model, 3, first=0)  # warm-up
            for repeat in range(options.repeats):
                first = 1000 * (repeat + 1)
                idle = await _questions(client, options.model, options.questions, first=first)
                async with _running_batch(client, options, f"latency {repeat}"):
                    busy = await _questions(client, options.model, options.questions, first=first + 500)
                ttft["idle"] += idle
                ttft["busy"] += busy
                ratios.append(statistics.median(busy) / statistics.median(idle))
    result = {arm: {"p50": percentile(times, 50), "p95": percentile(times, 95)} for arm, times in ttft.items()}
    print(
        "\nTTFT of a user, ms: "
        + "; ".join(f"{arm} p50 {times['p50']:.0f}, p95 {times['p95']:.0f}" for arm, times in result.items())
        + f"; beside a batch / idle {statistics.median(ratios):.2f}x",
        flush=True,
    )
    return {"ttft_ms": result, "busy_against_idle": statistics.median(ratios)}


async def _questions(client: httpx.AsyncClient, model: str, num: int, *, first: int) -> list[float]:
    """One after the other. -> milliseconds to each first token"""
    times = []
    for index in range(first, first + num):
        await asyncio.sleep(random.random() * PAUSE_S)
        times.append((await timed(over_http(client, model, index, ANSWER_TOKENS))).ttft * 1e3)
    return times


@asynccontextmanager
async def _running_batch(client: httpx.AsyncClient, options: argparse.Namespace, salt: str) -> AsyncIterator[None]:
    """Inside, a batch is in progress: its first row is answered and its last is not."""
    lines = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": chat_body(options.model, prompt, options.tokens),
        }
        for index, prompt in enumerate(prompts(options.rows, salt))
    ]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    uploaded = await _posted(client, "/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", data)})
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = await _posted(client, "/v1/batches", json=body)
    while not (await _status(client, batch["id"]))["request_counts"]["completed"]:
        await asyncio.sleep(0.2)
    yield
    if (status := (await _status(client, batch["id"]))["status"]) != "in_progress":
        raise SystemExit(f"the batch was {status} before the last question was answered: give more --rows")
    await _posted(client, f"/v1/batches/{batch['id']}/cancel")
    while (await _status(client, batch["id"]))["status"] == "cancelling":
        await asyncio.sleep(0.2)


async def _posted(client: httpx.AsyncClient, path: str, **content: Any) -> dict[str, Any]:
    response = await client.post(path, **content)
    if response.is_error:
        raise SystemExit(f"{path} answered {response.status_code}: {response.text}")
    return response.json()


async def _status(client: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    batch = (await client.get(f"/v1/batches/{batch_id}")).raise_for_status().json()
    if batch["status"] == "failed":
        raise SystemExit(f"the batch failed: {json.dumps(batch['errors'])}")
    return batch


def _with_batches(config: Path, folder: Path) -> Path:
    """A copy of `config` whose batches are kept in `folder`; what its models point to stays where it is."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    for model in content["models"].values():
        for key in ("path", "adapter"):
            if key in model and (local := config.parent / model[key]).exists():
                model[key] = str(local.resolve())
    content["batch"] = {**content.get("batch", {}), "folder": str(folder / "batches")}
    copy = folder / "config.yaml"
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    return copy
