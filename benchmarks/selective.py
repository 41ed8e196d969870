"""Selective averaging: how much of an average's gain is left, and what it costs, by the threshold.

*Quality*: the demo's members read pieces of the demo's test texts once. Every threshold is judged from that: bits per
byte of the selective average, how much of what the average gains on the main member (the base) is kept, and at which
share of tokens the others have a say. *Time*: answers at temperature 1 with seeds, in CPU seconds per token against the
main member alone; all arms of a row in every repeat, in a new order, ratios within a repeat.

    python -m benchmarks.selective [--bytes 3000] [--repeats 2] [--tokens 48] [--streams 1] [--only quality]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from benchmarks.decode import engine_of
from benchmarks.speculation import Arm, requests_of, seconds_of, separate_experts
from benchmarks.subjects import Subject
from ensemble_server.ensembles.base import Mixture, Sampling, When
from ensemble_server.ensembles.pooling import pool
from ensemble_server.ensembles.pooling.disagreement import entropy, total_variation
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.tokenizer import load_tokenizer

TEXTS = Path(__file__).parent.parent / "data" / "text"
WINDOW = 512  # tokens
THRESHOLDS = {"entropy": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0), "disagree": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)}
TIMED = {"entropy": (1.0, 2.0, 3.0, 4.0), "disagree": (0.1, 0.2, 0.3)}


@dataclass
class Readings:
    """Of every token that was read, (T,): what the main member and the pool gave it (nats), and what rules go by."""

    main: np.ndarray
    pooled: np.ndarray
    measured: Mapping[str, np.ndarray]  # rule -> (T,)
    num_bytes: int

    def bits_per_byte(self, rule: str, threshold: float) -> tuple[float, float]:
        """And the share of tokens that come from the pool."""
        is_joint = self.measured[rule] >= threshold
        nats = -np.where(is_joint, self.pooled, self.main).sum()
        return nats / math.log(2) / self.num_bytes, float(is_joint.mean())


async def read(
    engine: TransformersEngine, members: Sequence[str], token_ids: Sequence[int], num_bytes: int
) -> Readings:
    """The arithmetic pool with equal weights; the first of `members` is the main one."""
    parts: list[list[torch.Tensor]] = []

    def visit(logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        main = logprobs[0]
        pooled = pool("arithmetic", logprobs, logprobs.new_full(logprobs.shape[:2], 1 / len(members)))
        came = [rows.gather(1, targets[:, None])[:, 0] for rows in (main, pooled)]
        parts.append([*came, entropy(main), total_variation(main, pooled)])

    for begin in range(0, len(token_ids) - 1, WINDOW - 1):
        await engine.visit_logprobs(members, token_ids[begin : begin + WINDOW], visit)
    main, pooled, unsure, apart = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return Readings(main, pooled, {"entropy": unsure, "disagree": apart}, num_bytes)


def quality(engine: TransformersEngine, members: Sequence[str], num_bytes: int) -> dict[str, dict]:
    """Prints the curve; the mean over the texts of bits per byte."""
    tokenizer = load_tokenizer(resolve_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", relative_to=Path()))
    readings = []
    for path in sorted(TEXTS.glob("*_test.txt")):
        text = path.read_bytes()[:num_bytes].decode(errors="ignore")
        ids = tokenizer.encode(text, add_special_tokens=False)
        scored = len(text.encode()) - len(str(tokenizer.decode(ids[:1])).encode())
        readings.append(asyncio.run(read(engine, members, ids, scored)))

    def mean(rule: str, threshold: float) -> tuple[float, float]:
        found = [reading.bits_per_byte(rule, threshold) for reading in readings]
        return statistics.mean(bits for bits, _ in found), statistics.mean(share for _, share in found)

    alone, average = mean("entropy", math.inf)[0], mean("entropy", 0)[0]
    print(f"\n{', '.join(members)}: the main member alone {alone:.4f} bits per byte, the average {average:.4f}")
    rows = {}
    for rule, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            bits, share = mean(rule, threshold)
            rows[f"{rule} {threshold:g}"] = {"bpb": bits, "kept": (alone - bits) / (alone - average), "share": share}
            kept = (alone - bits) / (alone - average)
            print(f"  {rule:8s} {threshold:4g}: {bits:.4f}, {kept:6.1%} of the gain, {share:6.1%} of the tokens pooled")
    return {"alone": {"bpb": alone}, "average": {"bpb": average}, **rows}


def arms_of(engine: TransformersEngine, members: Sequence[str]) -> dict[str, Arm]:
    plain = Mixture(dict.fromkeys(members, 1.0))
    arms = {"main alone": Arm(engine, Mixture({members[0]: 1.0})), "average": Arm(engine, plain)}
    for rule, thresholds in TIMED.items():
        for threshold in thresholds:
            arms[f"{rule} {threshold:g}"] = Arm(engine, Mixture(plain.weights, when=When(**{rule: threshold})))
    return arms


def cost(arms: Mapping[str, Arm], streams: int, num_tokens: int, repeats: int) -> dict[str, float]:
    """CPU seconds per token against those of the main member alone: medians of the ratios within a repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for name in ("average", "main alone"):
        seconds_of(arms[name], requests_of("text", streams, Sampling(max_tokens=4), 0))
    order = list(arms)
    for repeat in range(repeats):
        random.shuffle(order)
        sampling = Sampling(temperature=1.0, seed=repeat, max_tokens=num_tokens, ignore_eos=True)
        for name in order:
            _, spent, answers = seconds_of(arms[name], requests_of("text", streams, sampling, repeat))
            seconds[name].append(spent / sum(map(len, answers)))
    ratios = {}
    for name, spent in seconds.items():
        pairs = zip(spent, seconds["main alone"], strict=True)
        ratios[name] = statistics.median(ours / alone for ours, alone in pairs)
        print(f"  {name:14s}: {1000 * statistics.median(spent):6.1f} CPU ms per token, {ratios[name]:.2f}x", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=3000, help="of each text")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--streams", type=int, nargs="*", default=[1])
    parser.add_argument("--only", choices=["quality", "shared", "separate"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    results: dict[str, dict] = {}
    if options.only != "separate":
        with tempfile.TemporaryDirectory() as root, engine_of(Subject().adapted(Path(root), 4)) as engine:
            members = ["base", "code", "jargon", "shakespeare"]
            if options.only != "shared":
                results["quality"] = quality(engine, members, options.bytes)
            for streams in options.streams if options.only != "quality" else ():
                print(f"\n{len(members)} members on one base, {streams} streams")
                arms = arms_of(engine, members)
                results[f"shared, {streams} streams"] = cost(arms, streams, options.tokens, options.repeats)
    if options.only in (None, "separate"):
        with tempfile.TemporaryDirectory() as root, engine_of(separate_experts(Path(root), 2)) as engine:
            for streams in options.streams:
                print(f"\n2 members, weights of their own, {streams} streams")
                arms = arms_of(engine, ["base", "code"])
                results[f"separate, {streams} streams"] = cost(arms, streams, options.tokens, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
