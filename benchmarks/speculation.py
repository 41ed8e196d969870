"""What reading ahead is worth: one stream, and several, with drafts and without.

Arms are engines over the same loaded members, so that only the drafts differ. All arms of a row run in every repeat, in
a new order each time, and ratios are taken within a repeat, so that a busy machine slows both sides. They are given in
time and in CPU seconds, which other work on the machine disturbs less. Members are the demo's base and experts, each
merged into weights of its own; `one` is the first of them alone. Prompts are of three kinds: text to go on with (the
prompt of `benchmarks.decode`), chats, and chats whose answer repeats what they were given. Answers are compared: they
have to be the same, token for token, but for near-ties that rounding decides.

    python -m benchmarks.speculation [--repeats 5] [--tokens 64] [--members 1 3] [--streams 1 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.decode import PROMPT
from benchmarks.subjects import BASE, EXPERT_NAMES, EXPERTS, Subject, add_options
from ensemble_server.ensembles.base import Delta, GenerationRequest, Mixture, PoolName, Sampling
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.engine import Drafts, TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.threads import in_own_thread

CODE = """def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        subtotal = subtotal + item.price * item.quantity
    tax = subtotal * tax_rate
    return subtotal + tax
"""
NOTES = (
    "The meeting began at nine. Anna reported that the new reading room will open in March, that the shelves have been "
    "ordered, and that two lamps are missing. Ben will order the lamps and ask the city for a second bicycle stand."
)
PROMPTS: dict[str, list[str | None]] = {
    "text": [PROMPT + str(i) for i in range(4)],
    "chat": [
        "Explain in a few sentences why the sky is blue.",
        "What should I cook tonight with rice, eggs and spinach?",
        "Write a short letter to a friend who has moved to another city.",
        "Give me three reasons to learn a second language.",
    ],
    "repeating": [
        f"Repeat this function without any change:\n\n{CODE}",
        f"Correct spelling errors and return the whole text:\n\n{NOTES}",
        f"Rewrite this function with the name price_with_tax in place of total_price:\n\n{CODE}",
        f"Copy this text word for word:\n\n{NOTES}",
    ],
}


def separate_experts(root: Path, count: int, subject: Subject = Subject()) -> dict[str, HostedModel]:  # noqa: B008
    """The demo's base and its first experts, each as a checkpoint of its own, stored as the base is."""
    folder = subject.checkpoint
    models = {"base": subject.hosted(str(folder))}
    for name in EXPERT_NAMES[: count - 1]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        merged = PeftModel.from_pretrained(model, str(EXPERTS / name)).merge_and_unload()
        merged.save_pretrained(root / name)
        for file in folder.iterdir():
            if not (root / name / file.name).exists() and file.suffix != ".safetensors":
                (root / name / file.name).symlink_to(file)
        models[name] = subject.hosted(str(root / name))
    return models


ARMS = ["one", "off", "text", "member"]


@dataclass
class Arm:
    """One engine, and what its steps say."""

    engine: TransformersEngine
    mixture: Mixture
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0

    def observe(self, stats: StepStats) -> None:
        self.drafted.update(stats.num_drafted)
        self.accepted.update(stats.num_accepted)
        self.num_steps += 1


@contextmanager
def arms_of(members: Mapping[str, Member], names: Sequence[str], pool: PoolName) -> Iterator[dict[str, Arm]]:
    arms: dict[str, Arm] = {}
    for name in names:
        drafts: Drafts = "text" if name == "text" else "member" if name == "member" else "off"
        engine = TransformersEngine(members, drafts=drafts, on_step=lambda stats, name=name: arms[name].observe(stats))
        taking_part = list(members)[:1] if name == "one" else list(members)
        arms[name] = Arm(engine, Mixture(dict.fromkeys(taking_part, 1.0), pool))
        engine.start()
    try:
        yield arms
    finally:
        for arm in arms.values():
            arm.engine.stop()


def requests_of(kind: str, streams: int, sampling: Sampling, repeat: int) -> list[GenerationRequest]:
    prompts = PROMPTS[kind]
    requests = []
    for stream in range(streams):
        prompt = prompts[(repeat + stream) % len(prompts)]
        if kind == "text":
            requests.append(GenerationRequest(prompt=prompt, sampling=sampling))
        else:
            requests.append(GenerationRequest(messages=({"role": "user", "content": prompt},), sampling=sampling))
    return requests


def seconds_of(arm: Arm, requests: Sequence[GenerationRequest]) -> tuple[float, float, list[list[int]]]:
    """How long the answers took together, prompts included, in time and in CPU seconds, and their tokens."""

    async def one(request: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        async for event in arm.engine.generate(arm.mixture, request, method="benchmark"):
            if isinstance(event, Delta):
                tokens += event.token_ids
        return tokens

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(one(request) for request in requests))

    started, cpu_started = time.perf_counter(), time.process_time()
    tokens = asyncio.run(together())
    return time.perf_counter() - started, time.process_time() - cpu_started, tokens


def measure(
    arms: Mapping[str, Arm], kind: str, streams: int, sampling: Sampling, repeats: int
) -> dict[str, dict[str, float]]:
    """Per arm: tokens per second, its time against that without drafts, tokens per step of a stream, and what became of
    its drafts."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}  # seconds per token
    same: dict[str, list[bool]] = {name: [] for name in arms}
    for arm in arms.values():
        arm.drafted.clear()
        arm.accepted.clear()
        arm.num_steps = 0
    order = list(arms)
    for repeat in range(repeats):
        random.shuffle(order)
        requests = requests_of(kind, streams, sampling, repeat)
        answers = {}
        for name in order:
            seconds, cpu_seconds, answers[name] = seconds_of(arms[name], requests)
            num_tokens = sum(map(len, answers[name]))
            speeds[name].append(num_tokens / seconds)
            cpu[name].append(cpu_seconds / num_tokens)
        for name in arms:
            same[name] += [ours == plain for ours, plain in zip(answers[name], answers["off"], strict=True)]
    rows = {}
    for name, arm in arms.items():
        drafted, accepted = sum(arm.drafted.values()), sum(arm.accepted.values())
        rows[name] = {
            "tokens_per_s": statistics.median(speeds[name]),
            "cpu_ms_per_token": 1000 * statistics.median(cpu[name]),
            "against_off": _median_ratio(speeds[name], speeds["off"]),
            "cpu_against_off": _median_ratio(cpu["off"], cpu[name]),
            "drafted": drafted,
            "accepted": accepted,
            "steps": arm.num_steps,
            "same": statistics.mean(same[name]),
        }
    return rows


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--members", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--kinds", nargs="*", choices=list(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--pool", choices=["arithmetic", "geometric", "posterior"], default="arithmetic")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model != BASE:
        parser.error(f"--model: members are the demo's experts, which are made for {BASE}")
    subject = Subject.of(options)
    transformers_logging.disable_progress_bar()
    sampling = Sampling(temperature=options.temperature, max_tokens=options.tokens, ignore_eos=True, seed=0)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {subject}, {options.tokens} new tokens, "
        f"temperature {options.temperature:g}"
    )
    results = {}
    for count in options.members:
        with tempfile.TemporaryDirectory() as root:
            models = separate_experts(Path(root), count, subject)
            files = read_member_files(models, relative_to=Path(), max_context=1024)
            members = asyncio.run(in_own_thread(load_members, models, files))
        with arms_of(
            members, [arm for arm in options.arms if count > 1 or arm in ("off", "text")], options.pool
        ) as arms:
            for arm in arms.values():
                seconds_of(arm, requests_of("text", max(options.streams), Sampling(max_tokens=4), 0))
            for kind in options.kinds:
                for streams in options.streams:
                    rows = measure(arms, kind, streams, sampling, options.repeats)
                    results[f"{count} members, {kind}, {streams} streams"] = rows
                    for name, row in rows.items():
                        print(
                            f"{count} members, {kind:9s}, {streams:2d} streams, {name:6s}: "
                            f"{row['tokens_per_s']:6.1f} tokens/s, {row['against_off']:5.2f}x; "
                            f"{row['cpu_ms_per_token']:6.1f} CPU ms, {row['cpu_against_off']:5.2f}x; drafted "
                            f"{row['drafted']:5.0f}, accepted {row['accepted']:5.0f}, {row['steps']:4.0f} steps, "
                            f"{row['same']:.0%} equal",
                            flush=True,
                        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
