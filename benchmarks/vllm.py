"""What an ensemble costs inside vLLM: one model against two and three members, and three adapters of one base.

Every arm is a vLLM engine in a process of its own, with the same settings; all are loaded at once and only one works at
a time, in a new order in every repeat. Besides wall time the CPU seconds of the arm's process are taken, which other
work on the machine disturbs less. Ratios are against the single model within the same repeat. Times include the prompt;
prefix caching is off, so that every repeat reads it anew.

    python -m benchmarks.vllm [--repeats 5] [--tokens 64] [--batches 1 16] [--arms single three ...] [--json FILE]

Needs the environment of `make vllm-env`: .venv-vllm/bin/python.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in the arm's own process: its CPU time counts
os.environ.setdefault("OMP_NUM_THREADS", "1")  # per arm, as vLLM takes on two cores
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from benchmarks.subjects import Subject, add_options
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.one_model.export import export

PROMPT = "The history of computing began long before the first electronic machines. In the nineteenth century, "


def members_of(arm: str, folder: Path, subject: Subject) -> dict[str, dict[str, Any]]:
    """The hosted models of an arm, as a config names them."""
    count = {"two": 2, "three": 3, "adapters": 4}[arm]
    models = subject.adapted(folder, count) if arm == "adapters" else subject.separate(folder, count)
    said = {"path", "base", "adapter"}
    return {name: model.model_dump(include=said, exclude_none=True) for name, model in models.items()}


ARMS = {
    "single": "one model",
    "two": "2 members, weights of their own",
    "three": "3 members, weights of their own",
    "adapters": "3 members on one base (LoRA)",
}


def directory_of(arm: str, root: Path, subject: Subject) -> Path:
    """What vLLM is to serve for this arm: the model's own folder, or an exported ensemble."""
    if arm == "single":
        return subject.checkpoint
    models = members_of(arm, root / f"{arm}-members", subject)
    mixed = [name for name in models if name != "base"]
    models["mix"] = {"method": "probability_average", "members": mixed}
    export(parse_config({"models": models}, source=root / "config.yaml"), "mix", root / arm)
    return root / arm


@dataclass(frozen=True)
class Run:
    wall_s: float
    cpu_s: float


def serve_arm(questions: Connection, folder: Path, dtype: str, gpu_share: float | None) -> None:
    """A process: for each (requests, tokens) it is asked for, answers with a `Run`. `gpu_share`: of the device's memory
    that this arm takes; None on a CPU, where vLLM runs eagerly, since compiling takes minutes."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=gpu_share is None,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=16,
        disable_log_stats=True,
        **({} if gpu_share is None else {"gpu_memory_utilization": gpu_share}),
    )
    questions.send("ready")
    while (question := questions.recv()) is not None:
        num_requests, num_tokens = question
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        wall, cpu = time.perf_counter(), time.process_time()
        engine.generate([f"{PROMPT}{index}" for index in range(num_requests)], sampling, use_tqdm=False)
        questions.send(Run(time.perf_counter() - wall, time.process_time() - cpu))


@contextmanager
def process_of(folder: Path, dtype: str, gpu_share: float | None) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_arm, args=(theirs, folder, dtype, gpu_share))
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
        ours.send(None)
    finally:
        process.join(timeout=30)
        process.kill()


def measure(
    subject: Subject, arms: Sequence[str], batches: Sequence[int], repeats: int, num_tokens: int
) -> dict[str, list[Run]]:
    """`arm@batch` -> one run per repeat. A first, shorter round warms up."""
    runs: dict[str, list[Run]] = {f"{arm}@{batch}": [] for arm in arms for batch in batches}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gpu_share = 0.85 / len(arms) if subject.device.startswith("cuda") else None
        folders = {arm: directory_of(arm, root, subject) for arm in arms}
        engines = {arm: stack.enter_context(process_of(folders[arm], subject.dtype, gpu_share)) for arm in arms}

        def run(arm: str, batch: int, tokens: int) -> Run:
            engines[arm].send((batch, tokens))
            return engines[arm].recv()

        order = [(arm, batch) for arm in arms for batch in batches]
        for arm, batch in order:
            run(arm, batch, 4)
        for _ in range(repeats):
            random.shuffle(order)
            for arm, batch in order:
                runs[f"{arm}@{batch}"].append(done := run(arm, batch, num_tokens))
                print(f"{arm}@{batch}: {done.wall_s:.2f} s, {done.cpu_s:.2f} s of CPU", file=sys.stderr, flush=True)
    return runs


def report(runs: dict[str, list[Run]], arms: Sequence[str], batches: Sequence[int], num_tokens: int) -> None:
    print("| members | requests | tokens/s | wall, in runs of one model | CPU seconds, likewise |")
    print("| --- | --- | --- | --- | --- |")
    for batch in batches:
        for arm in arms:
            mine, single = runs[f"{arm}@{batch}"], runs.get(f"single@{batch}", [])
            speed = statistics.median(batch * num_tokens / run.wall_s for run in mine)
            walls, cpus = (
                [getattr(a, key) / getattr(b, key) for a, b in zip(mine, single, strict=False)]
                for key in ("wall_s", "cpu_s")
            )
            ratios = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" if r else "" for r in (walls, cpus)]
            print(f"| {ARMS[arm]} | {batch} | {speed:.1f} | {ratios[0]} | {ratios[1]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    subject = Subject.of(options)
    print(f"{subject}, {options.tokens} new tokens, {options.repeats} repeats")
    runs = measure(subject, options.arms, options.batches, options.repeats, options.tokens)
    report(runs, options.arms, options.batches, options.tokens)
    if options.json:
        options.json.write_text(json.dumps({arm: [vars(run) for run in some] for arm, some in runs.items()}, indent=2))


if __name__ == "__main__":
    main()
