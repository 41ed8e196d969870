"""Decoding speed of the transformers engine against the loop that people write today.

The loop: for each new token, each model in turn at batch 1 with its own `past_key_values`, mean of the softmaxes,
argmax. It serves one request after the other, so its tokens per second are the same at any concurrency. It runs in a
process of its own, so that neither side's idle OpenMP threads slow the other. Both greedy, on the same prompts; times
include the prompt. All arms of a row run in every repeat, in a new order each time, and ratios
are taken within a repeat, so that a busy machine slows both sides.

    python -m benchmarks.decode [--repeats 5] [--tokens 64] [--json FILE]
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.subjects import Subject, add_options, load_as_in_use
from ensemble_server.ensembles.base import GenerationRequest, Mixture, Sampling
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.weights.devices import resolve_device
from ensemble_server.server.weights.threads import in_own_thread

CONCURRENCIES = (1, 4, 16)
PROMPT = "The history of computing began long before the first electronic machines. In the nineteenth century, "


def serve_loop(questions: Connection, subject: Subject, num_members: int) -> None:
    """A process: for each number of tokens that is asked for, one request through the plain loop; answers seconds."""
    transformers_logging.disable_progress_bar()
    folder, device = subject.checkpoint, resolve_device(subject.device)
    dtype = getattr(torch, subject.dtype)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(num_members)]
    models = [model.to(device).eval() for model in models]
    prompt_ids = AutoTokenizer.from_pretrained(folder).encode(PROMPT + "0")
    while (num_tokens := questions.recv()) is not None:
        questions.send(loop_seconds(models, prompt_ids, num_tokens))


@contextmanager
def loop_of(subject: Subject, num_members: int) -> Iterator[Callable[[int], float]]:
    """A function from a number of tokens to the seconds that the loop takes for one request."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_loop, args=(theirs, subject, num_members))
    process.start()

    def seconds(num_tokens: int) -> float:
        ours.send(num_tokens)
        return ours.recv()

    try:
        yield seconds
    finally:
        ours.send(None)
        process.join()


def loop_seconds(models: Sequence[PreTrainedModel], prompt_ids: list[int], num_tokens: int) -> float:
    """One request through the plain loop over `models`."""
    started = time.perf_counter()
    caches: list[Any] = [None] * len(models)
    step = torch.tensor([prompt_ids], device=models[0].device)
    with torch.no_grad():
        for _ in range(num_tokens):
            mean: Any = 0.0
            for index, model in enumerate(models):
                output = model(step, past_key_values=caches[index], use_cache=True, logits_to_keep=1)
                caches[index] = output.past_key_values
                mean = mean + torch.softmax(output.logits[:, -1].float(), -1) / len(models)
            step = mean.argmax(-1, keepdim=True)
            step.tolist()  # as who shows it does; an accelerator is waited for
    return time.perf_counter() - started


def engine_seconds(engine: TransformersEngine, mixture: Mixture, concurrency: int, num_tokens: int) -> float:
    """`concurrency` requests at once through the engine."""
    sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    async def one(index: int) -> None:
        request = GenerationRequest(prompt=f"{PROMPT}{index}", sampling=sampling)
        async for _ in engine.generate(mixture, request, method="benchmark"):
            pass

    async def together() -> None:
        await asyncio.gather(*(one(index) for index in range(concurrency)))

    started = time.perf_counter()
    asyncio.run(together())
    return time.perf_counter() - started


@contextmanager
def engine_of(models: dict[str, HostedModel]) -> Iterator[TransformersEngine]:
    members = asyncio.run(in_own_thread(load_as_in_use, models, max_context=1024))
    engine = TransformersEngine(members)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def measure(
    subject: Subject, models: dict[str, HostedModel], repeats: int, num_tokens: int, streams: Sequence[int]
) -> dict[str, list[float]]:
    """Speeds of the loop, of the engine with all members, and with one alone: name of arm -> tokens/s per repeat."""
    mixture, alone = Mixture(dict.fromkeys(models, 1.0)), Mixture({next(iter(models)): 1.0})
    with engine_of(models) as engine, loop_of(subject, len(models)) as loop:
        arms: dict[str, Callable[[], float]] = {"loop": lambda: num_tokens / loop(num_tokens)}
        for n in streams:
            arms[f"engine@{n}"] = lambda n=n: n * num_tokens / engine_seconds(engine, mixture, n, num_tokens)
            arms[f"single@{n}"] = lambda n=n: n * num_tokens / engine_seconds(engine, alone, n, num_tokens)
        engine_seconds(engine, mixture, max(streams), 4)  # warm up
        loop(4)
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        order = list(arms)
        for _ in range(repeats):
            random.shuffle(order)
            for name in order:
                speeds[name].append(arms[name]())
    return speeds


def report(title: str, speeds: dict[str, list[float]], streams: Sequence[int]) -> dict[str, Any]:
    """One block of the table: medians, and medians of the ratios within each repeat, with the lowest and highest."""

    def ratio(arm: str, against: str) -> list[float]:
        found = [a / b for a, b in zip(speeds[arm], speeds[against], strict=True)]
        return [statistics.median(found), min(found), max(found)]

    def told(ratios: list[float]) -> str:
        return "{:.2f}x ({:.2f} to {:.2f})".format(*ratios)

    print(f"\n{title}: loop {statistics.median(speeds['loop']):.1f} tokens/s")
    rows = {}
    for n in streams:
        row = {
            "tokens_per_s": statistics.median(speeds[f"engine@{n}"]),
            "single_tokens_per_s": statistics.median(speeds[f"single@{n}"]),
            "against_loop": ratio(f"engine@{n}", "loop"),
            "cost_in_singles": ratio(f"single@{n}", f"engine@{n}"),
        }
        print(
            f"  {n:2d} requests: {row['tokens_per_s']:6.1f} tokens/s, {told(row['against_loop'])} the loop, "
            f"the time of {told(row['cost_in_singles'])} runs of a single member",
            flush=True,
        )
        rows[str(n)] = row
    return {"loop_tokens_per_s": statistics.median(speeds["loop"]), "engine": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=list(CONCURRENCIES))
    parser.add_argument("--only", choices=["separate", "adapters"])
    parser.add_argument("--members", type=int, nargs="*", help="only these numbers of members")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    subject = Subject.of(options)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {subject}, {options.tokens} new tokens")
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for kind, counts in (("separate", (1, 2, 3)), ("adapters", (2, 4))):
            if options.only not in (None, kind):
                continue
            for count in counts:
                if options.members and count not in options.members:
                    continue
                folder = Path(root) / str(count)
                models = subject.separate(folder, count) if kind == "separate" else subject.adapted(folder, count)
                speeds = measure(subject, models, options.repeats, options.tokens, options.streams)
                results[f"{kind} {count}"] = report(f"{count} members, {kind}", speeds, options.streams)
                if options.json:  # after each: an end in the middle leaves what is done
                    options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
