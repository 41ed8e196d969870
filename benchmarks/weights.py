"""One member with its weights kept as fp16 against the same with float32 weights packed for oneDNN.

Each side is an engine in a process of its own, so that neither's idle OpenMP threads slow the other. Both decode the
same prompts greedily, at 1, 4 and 16 requests, and read one prompt of 512 tokens; they take turns, in a new order each
time, and ratios are taken within a repeat. CPU time is that of the side's whole process.

    python -m benchmarks.weights [--repeats 5] [--tokens 64]
    python -m benchmarks.weights --layers

`--layers` times the linear layers alone, one thread, plain, packed for oneDNN and as fp16: all 210 of the blocks one
after the other, as a step does, so that each is read from memory and not from a cache, and the head.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from benchmarks.decode import CONCURRENCIES, engine_seconds
from benchmarks.subjects import BASE
from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.half_weights import WeightsRule, halving
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.engines.transformers_engine.packed_linear import PackedLinear
from ensemble_server.server.weights.member_views import read_member_files

SIDES = ("full", "exact")
PROMPT_TOKENS = 512


def serve(questions: Connection, weights: WeightsRule) -> None:
    """A process: for (requests, new tokens) it answers wall and CPU seconds; 0 requests is the prompt alone."""
    transformers_logging.disable_progress_bar()
    models = {"base": HostedModel(path=BASE, dtype="float32")}
    started = time.process_time()
    files = read_member_files(models, relative_to=Path(), max_context=1024)
    members = load_members(models, files, weights=weights)
    backbone = members["base"].backbone
    loaded = time.process_time()
    for _ in backbone.halving():
        pass
    questions.send((loaded - started, time.process_time() - loaded))
    engine = TransformersEngine(members)
    engine.start()
    prompt = [token % 40000 + 100 for token in range(PROMPT_TOKENS)]
    while (question := questions.recv()) is not None:
        num_requests, num_tokens = question
        cpu, wall = time.process_time(), time.perf_counter()
        if num_requests:
            engine_seconds(engine, Mixture({"base": 1.0}), num_requests, num_tokens)
        else:
            backbone.forward([Span(RowCache(), prompt, 1)])
        questions.send((time.perf_counter() - wall, time.process_time() - cpu))
    engine.stop()


def time_layers(repeats: int) -> None:
    """CPU milliseconds, the least of the repeats."""
    torch.set_num_threads(1)
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
    weights = [(torch.randn(shape) * 0.05).half().float() for shape in [*shapes, (49152, 576)]]
    plain = [nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False) for weight in weights]
    for layer, weight in zip(plain, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    halved = nn.Sequential(*plain)
    for _ in halving(halved):
        pass
    arms = {"plain": plain, "oneDNN": [PackedLinear(weight, None) for weight in weights], "fp16": list(halved)}
    with torch.inference_mode():
        for num_rows in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            inputs = {width: torch.randn(1, num_rows, width) for width in (576, 1536)}
            blocks, head = dict.fromkeys(arms, math.inf), dict.fromkeys(arms, math.inf)
            for _ in range(repeats):
                for arm, layers in arms.items():
                    begun = time.process_time()
                    for layer, weight in zip(layers[:-1], weights[:-1], strict=True):
                        layer(inputs[weight.shape[1]])
                    done = time.process_time()
                    layers[-1](inputs[576])
                    blocks[arm] = min(blocks[arm], (done - begun) * 1000)
                    head[arm] = min(head[arm], (time.process_time() - done) * 1000)
            told = (f"{arm} {blocks[arm]:.1f} + {head[arm]:.1f}" for arm in arms)
            print(f"{num_rows} rows, ms of the blocks + the head: {', '.join(told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    if options.layers:
        time_layers(options.repeats)
        return
    context, sides = multiprocessing.get_context("spawn"), {}
    for weights in SIDES:
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=serve, args=(theirs, weights))
        process.start()
        load, packing = ours.recv()
        sides[weights] = (ours, process)
        print(f"{weights}: {load:.1f} s of CPU to load, {packing:.1f} to pack as fp16", flush=True)
    arms = [(n, options.tokens) for n in CONCURRENCIES] + [(0, 0)]
    seconds: dict[tuple[str, tuple[int, int]], list[tuple[float, float]]] = {}
    for repeat in range(options.repeats + 1):
        for arm in random.sample(arms, len(arms)):
            for weights in random.sample(SIDES, len(SIDES)):
                question = (arm[0], 4) if repeat == 0 and arm[0] else arm  # the first warms up
                sides[weights][0].send(question)
                answer = sides[weights][0].recv()
                if repeat:
                    seconds.setdefault((weights, arm), []).append(answer)
                    print(f"{weights}, {arm[0]} requests: {answer[0]:.2f} s, {answer[1]:.2f} of CPU", flush=True)
    for ours, process in sides.values():
        ours.send(None)
        process.join()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for arm in arms:
        name = f"{arm[0]} requests" if arm[0] else f"a prompt of {PROMPT_TOKENS}"
        per = arm[0] * arm[1] or PROMPT_TOKENS
        full, half = (seconds[weights, arm] for weights in SIDES)
        medians = [statistics.median(cpu for _, cpu in side) / per * 1000 for side in (full, half)]
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(full, half, strict=True)) for i in (0, 1)]
        print(
            f"{name}: {medians[0]:.2f} ms of CPU per token with float32, {medians[1]:.2f} with fp16; "
            f"{ratios[1]:.2f}x, {ratios[0]:.2f}x by the wall clock"
        )


if __name__ == "__main__":
    main()
