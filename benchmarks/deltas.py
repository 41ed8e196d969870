"""Memory and decode steps of several members that are deltas on one base, against one member.

Deltas are made of random numbers, at a budget: what they take and how long they are multiplied with does not depend on
the numbers. They change every linear layer of the blocks and every norm; embeddings are the base's. A step is one token
of one request at a context of 128: read by the base alone, or by all members. Both in turn in every repeat; the ratio
is taken within a repeat, so that a busy machine slows both sides.

    python -m benchmarks.deltas [--members 4] [--budget 1/16] [--repeats 40] [--method bitdelta ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from ensemble_server.server.deltas.dropping import density_for
from ensemble_server.server.engines.transformers_engine.adapters import AdapterRows
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.deltas import wrap_layers
from ensemble_server.server.engines.transformers_engine.half_weights import HalfEmbedding, HalfLinear
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.delta_folder import METHODS
from ensemble_server.server.weights.deltas import GROUP, Delta, LowRank, MatrixDelta, MixedLowRank, SignPlanes, Sparse

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 16))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--method", action="append", choices=METHODS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| method | one delta, stored | memory of all, base = 1 | step of all, base = 1 (quartiles) | base's step |")
    print("|---|---|---|---|---|")
    for method in settings.method or METHODS:
        measure(method, settings)


def measure(method: str, settings: argparse.Namespace) -> None:
    folder = resolve_checkpoint(BASE, relative_to=Path())
    backbone = Backbone.load(folder, dtype="float32", device="cpu", adapters={}, vocab_size=49152)
    for _ in backbone.halving():
        pass
    base_bytes = memory(backbone.model)
    names = [f"member{index}" for index in range(settings.members)]
    rows, at_head = AdapterRows(names), AdapterRows(names)
    deltas = {name: random_delta(backbone, method, settings.budget) for name in names}
    stored = sum(matrix.num_bytes for matrix in deltas[names[0]].matrices.values())
    wrap_layers(backbone.model, deltas, rows, at_head)
    backbone._adapters, backbone._at_head = rows, at_head
    all_bytes = memory(backbone.model)
    caches = [RowCache() for _ in names]
    backbone.forward(
        [Span(cache, list(range(1000, 1000 + CONTEXT)), 0, name) for cache, name in zip(caches, names, strict=True)]
    )
    alone = RowCache()
    backbone.forward([Span(alone, list(range(1000, 1000 + CONTEXT)), 0, None)])
    times: list[tuple[float, float]] = []
    for repeat in range(settings.repeats + 5):
        token = [2000 + repeat]
        start = time.perf_counter()
        backbone.forward([Span(alone, token, 1, None)])
        middle = time.perf_counter()
        backbone.forward([Span(cache, token, 1, name) for cache, name in zip(caches, names, strict=True)])
        times.append((middle - start, time.perf_counter() - middle))
    times = times[5:]
    low, median, high = statistics.quantiles([together / one for one, together in times])
    print(
        f"| {method} at {settings.budget} | {stored / 1e6:.1f} MB | {all_bytes / base_bytes:.2f} "
        f"| {median:.2f} ({low:.2f} to {high:.2f}) | {1000 * statistics.median(one for one, _ in times):.0f} ms |",
        flush=True,
    )


def random_delta(backbone: Backbone, method: str, budget: Fraction) -> Delta:
    matrices, kept = {}, {}
    for path, module in backbone.model.named_modules():
        if isinstance(module, HalfLinear) and path != "lm_head":
            matrices[path] = random_matrix(method, tuple(module.weight.shape), float(budget))
        elif path.endswith("norm"):
            kept[f"{path}.weight"] = module.weight.detach() * 1.001
    return Delta(matrices, kept, {})


def random_matrix(method: str, shape: tuple[int, int], budget: float) -> MatrixDelta:
    num_out, num_in = shape
    num_bytes = 2 * num_out * num_in * budget
    if method == "svd":
        rank = round(num_bytes / 2 / (num_out + num_in))
        return LowRank((1e-2 * torch.randn(rank, num_in)).half(), (1e-2 * torch.randn(num_out, rank)).half())
    if method == "delta-come":  # nearly all of 2 bits, as it comes out of a budget of 1/16
        per_component = 3 + 2 * -(-num_in // GROUP) + -(-num_in * 2 // 8) + -(-num_out * 2 // 8)
        rank = round(num_bytes / per_component)
        return MixedLowRank(
            torch.full((rank,), 2, dtype=torch.uint8),
            torch.randint(-2, 2, (rank, num_in), dtype=torch.int8),
            (1e-2 * torch.rand(rank, -(-num_in // GROUP))).half(),
            torch.randint(-2, 2, (rank, num_out), dtype=torch.int8),
            (1e-2 * torch.rand(rank)).half(),
        )
    if method == "bitdelta":
        planes = max(1, round(16 * budget))
        return SignPlanes(torch.rand(planes, num_out, num_in) < 0.5, 1e-3 * torch.rand(planes))
    count = round(density_for(16 * budget) * num_out * num_in)
    places = torch.randperm(num_out * num_in)[:count].sort().values
    return Sparse((num_out, num_in), places, (1e-3 * torch.randn(count)).half())


def memory(model: nn.Module) -> int:
    """Bytes of all weights. Those in fp16 hold no numbers that torch counts: two bytes for each."""
    total = 0
    for module in model.modules():
        if isinstance(module, HalfLinear | HalfEmbedding):
            total += 2 * module.weight.numel()
            continue
        total += sum(map(size_of, tensors_of(module)))
    return total


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def size_of(tensor: torch.Tensor) -> int:
    if tensor.layout == torch.sparse_csr:
        return sum(size_of(part) for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
