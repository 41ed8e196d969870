"""How members are made to fit into free memory: which dtype, how many sequences at once, how long a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_server.server.weights.footprint import DTYPE_BYTES, Shape, Weights

MAX_BATCH = 32
MAX_CONTEXT = 4096
LEAST_CONTEXT = 512
SPARE = 0.15  # of what is free, for activations and everybody else


@dataclass(frozen=True)
class Load:
    """Weights that are loaded once, and how many members stand on them, each with a cache of its own."""

    weights: Weights
    shape: Shape
    num_members: int


@dataclass(frozen=True)
class Fit:
    """`dtype` is None where none fits as stored; then nothing is promised."""

    dtype: str | None
    max_batch: int
    max_context: int
    num_bytes: int

    @property
    def is_full(self) -> bool:
        """Whether nothing had to be given up."""
        return self.dtype is not None and self.max_batch == MAX_BATCH


def fit(loads: Sequence[Load], free_bytes: int, *, prefers_float32: bool) -> Fit:
    """The first that fits of: float32 (if preferred) and as stored; within one dtype many sequences before few, and a
    long context before a short one.
    """
    room = free_bytes * (1 - SPARE)
    longest = max((load.shape.max_positions or MAX_CONTEXT for load in loads), default=MAX_CONTEXT)
    context = min(MAX_CONTEXT, longest)
    batches = [MAX_BATCH >> halvings for halvings in range(MAX_BATCH.bit_length())]
    contexts = [context]
    while contexts[-1] > LEAST_CONTEXT:
        contexts.append(max(LEAST_CONTEXT, contexts[-1] // 2))
    for dtype in ("float32", "auto") if prefers_float32 else ("auto",):
        for max_context in contexts:
            for max_batch in batches:
                needed = num_bytes(loads, dtype, max_batch, max_context)
                if needed <= room:
                    return Fit(dtype, max_batch, max_context, needed)
    return Fit(None, 1, contexts[-1], num_bytes(loads, "auto", 1, contexts[-1]))


def num_bytes(loads: Sequence[Load], dtype: str, max_batch: int, max_context: int) -> int:
    """Weights, and the caches of `max_batch` sequences of full length on every member."""
    total = 0
    for load in loads:
        stored = max(2, round(load.weights.num_bytes / max(1, load.weights.num_parameters)))  # caches have 16 bits
        per_number = DTYPE_BYTES.get(dtype) or stored
        context = min(max_context, load.shape.max_positions or max_context)
        cache = load.shape.kv_bytes(context, per_number) * load.num_members
        total += load.weights.bytes_as(dtype) + max_batch * cache
    return total
