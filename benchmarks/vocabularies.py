"""Members of different vocabularies in one average: rows per piece, where a step's time goes, and what the pair costs.

    python -m benchmarks.vocabularies --other FILE_OR_FOLDER [--tokens 40] [--repeats 3] [--concurrencies 1 4]

SmolLM2-135M-Instruct and another hosted model, averaged half and half over text, write greedy answers; each alone
writes them by its own tokens. All arms run in every repeat, in a new order each time, and ratios are taken within a
repeat, so that a busy machine slows all of them. Times are per byte written, as answers differ. `--load` only measures
what a vocabulary costs when it is loaded: CPU seconds of its tokenizer, of its tokens' bytes and of sorting them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from ensemble_server.ensembles.base import Answer, GenerationRequest, Mixture, Model, Sampling, collect
from ensemble_server.ensembles.spelling.byte_order import ByteOrder
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.tokenizer import Vocabulary, load_tokenizer

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = (
    "The history of computing began long before the first electronic machines. In the nineteenth century,",
    "The river runs through the old town, past the market and the mill, and",
    "To make bread you need flour, water, salt and yeast. First",
    "In a letter to his brother he wrote that the winter had been",
)


class Clock:
    """How long steps take, and how long of that the members' forwards."""

    def __init__(self) -> None:
        self.steps_s = self.forwards_s = 0.0
        self.num_rows: Counter[str] = Counter()

    def observe(self, stats: StepStats) -> None:
        self.steps_s += stats.duration_s
        self.num_rows.update(stats.num_rows)

    def reset(self) -> None:
        self.steps_s = self.forwards_s = 0.0
        self.num_rows.clear()


@contextmanager
def timed_forwards(clock: Clock) -> Iterator[None]:
    """The engine runs members one after the other on one device, so their times add up."""
    forward = Backbone.forward

    def timed(self: Backbone, spans: Sequence[Span]) -> list[torch.Tensor]:
        started = time.perf_counter()
        try:
            return forward(self, spans)
        finally:
            clock.forwards_s += time.perf_counter() - started

    Backbone.forward = timed
    try:
        yield
    finally:
        Backbone.forward = forward


def load_seconds(path: str) -> dict[str, float]:
    """CPU seconds of one thread."""
    folder = resolve_checkpoint(path, relative_to=Path())
    times = [time.process_time()]
    tokenizer = load_tokenizer(folder)
    times.append(time.process_time())
    token_bytes = Vocabulary(tokenizer).token_bytes()
    times.append(time.process_time())
    ByteOrder(token_bytes, [tokenizer.eos_token_id])
    times.append(time.process_time())
    names = ("tokenizer", "bytes of tokens", "order")
    return {name: end - begin for name, begin, end in zip(names, times, times[1:], strict=False)}


class OnEngine(Model):
    """A mixture as a model, with no config around it."""

    def __init__(self, engine: TransformersEngine, mixture: Mixture) -> None:
        self.name, self._engine, self._mixture = "mixture", engine, mixture

    def generate(self, request: GenerationRequest):
        return self._engine.generate(self._mixture, request, method="benchmark")


async def answers(engine: TransformersEngine, mixture: Mixture, num: int, num_tokens: int) -> list[Answer]:
    sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [
        GenerationRequest(prompt=PROMPTS[i % len(PROMPTS)], sampling=sampling, overrides={}, explain=True)
        for i in range(num)
    ]
    return list(await asyncio.gather(*(collect(OnEngine(engine, mixture), request) for request in requests)))


async def measure(members: Mapping[str, Member], options: argparse.Namespace) -> None:
    clock = Clock()
    engine = TransformersEngine(members, on_step=clock.observe, prefix_cache_bytes=0)
    engine.start()
    pair = Mixture(dict.fromkeys(members, 1.0))
    arms = {"pair": pair} | {name: Mixture({name: 1.0}) for name in members}
    try:
        with timed_forwards(clock):
            await answers(engine, pair, 1, 4)  # warm up
            for num in options.concurrencies:
                await measure_at(engine, clock, arms, num, options)
    finally:
        engine.stop()


async def measure_at(
    engine: TransformersEngine, clock: Clock, arms: Mapping[str, Mixture], num: int, options: argparse.Namespace
) -> None:
    per_byte: dict[str, list[float]] = {name: [] for name in arms}
    outside: dict[str, list[float]] = {name: [] for name in arms}
    told: dict[str, Mapping[str, float]] = {}
    for _ in range(options.repeats):
        for name in random.sample(list(arms), len(arms)):
            clock.reset()
            found = await answers(engine, arms[name], num, options.tokens)
            num_bytes = sum(len(choice.text.encode()) for answer in found for choice in answer.choices)
            per_byte[name].append(clock.steps_s / num_bytes)
            outside[name].append(1 - clock.forwards_s / clock.steps_s)
            if name == "pair":
                traces = [answer.done.trace or {} for answer in found]
                told = {
                    member: {key: sum(trace["members"][member][key] for trace in traces) for key in ("rows", "tokens")}
                    for member in arms["pair"].weights
                }
    alone = [name for name in arms if name != "pair"]
    ratios = [
        pair / sum(of_members)
        for pair, *of_members in zip(per_byte["pair"], *(per_byte[name] for name in alone), strict=True)
    ]
    print(f"\n{num} requests, {options.tokens} pieces each, {options.repeats} repeats")
    for name in arms:
        print(
            f"  {name:8s} {1000 * statistics.median(per_byte[name]):7.2f} ms per byte, outside forwards "
            f"{statistics.median(outside[name]):.0%}"
        )
    print(f"  pair against the sum of its members alone, per byte: {_spread(ratios)}")
    for member, counts in told.items():
        rows_per_piece, tokens_per_row = counts["rows"] / (num * options.tokens), counts["tokens"] / counts["rows"]
        print(f"  {member}: {rows_per_piece:.2f} rows per piece, {tokens_per_row:.2f} tokens per row", flush=True)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--other", required=True, help="a folder, .gguf file or hub id")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrencies", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--load", action="store_true", help="only measure what the vocabularies cost at load")
    options = parser.parse_args()
    for path in (BASE, options.other):
        print(path, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in load_seconds(path).items()))
    if options.load:
        return
    models = {
        "smol": HostedModel(path=BASE, dtype="float32"),
        "other": HostedModel(path=options.other, dtype="float32"),
    }
    members = load_members(models, read_member_files(models, relative_to=Path(), max_context=1024))
    asyncio.run(measure(members, options))


if __name__ == "__main__":
    main()
