"""Members of different vocabularies in one average: rows per piece, where a step's time goes, and what the pair costs.

    python -m benchmarks.vocabularies --other FILE_OR_FOLDER --out results.json [--tokens 16] [--repeats 3]

SmolLM2-135M-Instruct and another hosted model, averaged half and half over text, write greedy answers, once with five
alternatives to each piece; each alone writes them by its own tokens. All arms run in every repeat, in a new order each
time, and ratios are taken within a repeat. Times are CPU seconds of one thread, per byte written, as answers differ and
machines are busy. Each answering is written to `--out` when it is done: a run that is stopped goes on where it was.
`--load` only measures what a vocabulary costs when it is loaded: CPU seconds of its tokenizer, of its tokens' bytes and
of sorting them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

ALTERNATIVES, NUM_TOP = "pair, alternatives", 5
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = (
    "The history of computing began long before the first electronic machines. In the nineteenth century,",
    "The river runs through the old town, past the market and the mill, and",
    "To make bread you need flour, water, salt and yeast. First",
    "In a letter to his brother he wrote that the winter had been",
)


class Clock:
    """CPU seconds of the process: all, and those of the members' forwards."""

    def __init__(self) -> None:
        self.forwards_s = self._began = 0.0
        self.num_rows: Counter[str] = Counter()

    @property
    def all_s(self) -> float:
        return time.process_time() - self._began

    def observe(self, stats: StepStats) -> None:
        self.num_rows.update(stats.num_rows)

    def reset(self) -> None:
        self._began, self.forwards_s = time.process_time(), 0.0
        self.num_rows.clear()


@contextmanager
def timed_forwards(clock: Clock) -> Iterator[None]:
    """The engine runs members one after the other on one device, so their times add up."""
    forward = Backbone.forward

    def timed(self: Backbone, spans: Sequence[Span]) -> list[torch.Tensor]:
        started = time.process_time()
        try:
            return forward(self, spans)
        finally:
            clock.forwards_s += time.process_time() - started

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


async def answers(
    engine: TransformersEngine, mixture: Mixture, num: int, num_tokens: int, num_top: int | None = None
) -> list[Answer]:
    sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [
        GenerationRequest(prompt=PROMPTS[i % len(PROMPTS)], sampling=sampling, top_logprobs=num_top) for i in range(num)
    ]
    return list(await asyncio.gather(*(collect(OnEngine(engine, mixture), request) for request in requests)))


async def measure(members: Mapping[str, Member], options: argparse.Namespace) -> None:
    """What `options.out` lacks, one answering of one arm at a time."""
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    clock = Clock()
    engine = TransformersEngine(members, on_step=clock.observe, prefix_cache_bytes=0, num_threads=1)
    engine.start()
    pair = Mixture(dict.fromkeys(members, 1.0))
    arms = {"pair": pair, ALTERNATIVES: pair} | {name: Mixture({name: 1.0}) for name in members}
    wanted = [
        (num, repeat, name)
        for num in options.concurrencies
        for repeat in range(options.repeats)
        for name in random.sample(list(arms), len(arms))
    ]
    try:
        with timed_forwards(clock):
            await answers(engine, pair, 1, 4)  # warm up
            for num, repeat, name in wanted:
                if (key := f"{num} {options.tokens} {repeat} {name}") in known:
                    continue
                clock.reset()
                top = NUM_TOP if name == ALTERNATIVES else None
                found = await answers(engine, arms[name], num, options.tokens, top)
                num_bytes = sum(len(choice.text.encode()) for answer in found for choice in answer.choices)
                known[key] = {
                    "all_s": clock.all_s,
                    "forwards_s": clock.forwards_s,
                    "bytes": num_bytes,
                    "rows": {member: rows - num for member, rows in clock.num_rows.items()},  # prompts are one each
                }
                options.out.write_text(json.dumps(known, indent=1))
    finally:
        engine.stop()
    for num in options.concurrencies:
        print("\n".join(described(known, num, options, list(arms))), flush=True)


def described(known: Mapping[str, Any], num: int, options: argparse.Namespace, arms: Sequence[str]) -> Iterator[str]:
    found = {
        name: [known[f"{num} {options.tokens} {repeat} {name}"] for repeat in range(options.repeats)] for name in arms
    }
    per_byte = {name: [one["all_s"] / one["bytes"] for one in of_arm] for name, of_arm in found.items()}
    yield f"\n{num} requests, {options.tokens} pieces each, {options.repeats} repeats; CPU time"
    for name, of_arm in found.items():
        outside = statistics.median(1 - one["forwards_s"] / one["all_s"] for one in of_arm)
        rows = ", ".join(
            f"{member} {statistics.median(one['rows'][member] for one in of_arm) / num / options.tokens:.2f}"
            for member in of_arm[0]["rows"]
        )
        time_of_byte = f"{1000 * statistics.median(per_byte[name]):7.2f} ms per byte"
        yield f"  {name:20s} {time_of_byte}, outside forwards {outside:.0%}; rows per piece: {rows}"
    alone = zip(*(per_byte[name] for name in arms if name not in ("pair", ALTERNATIVES)), strict=True)
    sums = list(map(sum, alone))
    for name in ("pair", ALTERNATIVES):
        ratios = [own / both for own, both in zip(per_byte[name], sums, strict=True)]
        yield f"  {name} against the sum of its members alone, per byte: {_spread(ratios)}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--other", required=True, help="a folder, .gguf file or hub id")
    parser.add_argument("--out", type=Path, default=Path("vocabularies.json"), help="what was measured so far")
    parser.add_argument("--tokens", type=int, default=16)
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
