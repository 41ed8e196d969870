"""The KV cache of one row: what one member remembers of one request.

One row, one growing buffer per layer: nothing is padded to the longest request, and freeing a row is dropping it. What
rows have in common, the beginning of a prompt or the prompt of several choices, stands in front of that in `Segment`s,
which are in memory once.
Layers are allocated at their first use, from the keys they are given, so layers of different shapes need no
description. Sliding-window layers keep all their keys too; only the attention looks back less far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

LayerSlices = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys, values: (num_kv_heads, n, head_dim)

GROWTH = 128  # tokens by which a buffer grows at least; growing copies, so it is worth doing rarely


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens that rows share, `length` of them. Never written to."""

    length: int
    layers: LayerSlices

    @cached_property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def beginning(self, num_tokens: int) -> Segment:
        """The first `num_tokens` of it, in the same memory."""
        views = {layer: (keys[:, :num_tokens], values[:, :num_tokens]) for layer, (keys, values) in self.layers.items()}
        return Segment(num_tokens, views)


class RowCache:
    """`length`: tokens whose keys are in every layer, shared ones (`num_shared`) included. `num_bytes`: of its own."""

    def __init__(self, shared: tuple[Segment, ...] = (), *, num_planned: int = 0) -> None:
        """`num_planned`: own tokens for which buffers have room at once; behind them they grow by blocks."""
        self.shared = shared
        self._num_planned = num_planned
        self.num_shared = sum(segment.length for segment in shared)
        self.length = self.num_shared
        self.num_bytes = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write n new tokens behind the known ones; returns views of the keys and values of all that is the row's own.

        keys, values: (num_kv_heads, n, head_dim) -> (num_kv_heads, length - num_shared + n, head_dim). `length` does
        not move until `commit`: a forward that fails half-way can be repeated.
        """
        begin = self.length - self.num_shared
        end = begin + keys.shape[1]
        if layer not in self._layers or self._layers[layer][0].shape[1] < end:
            self._grow(layer, end, keys, values)
        all_keys, all_values = self._layers[layer]
        all_keys[:, begin:end] = keys
        all_values[:, begin:end] = values
        return all_keys[:, :end], all_values[:, :end]

    def with_shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, num_last: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The row's own `keys` and `values` behind those that it shares: a copy, of `num_last` tokens if they do."""
        parts, num_tokens = [(keys, values)], keys.shape[1]
        for segment in reversed(self.shared):
            lacking = segment.length if num_last is None else min(num_last - num_tokens, segment.length)
            if lacking <= 0:
                break
            known_keys, known_values = segment.layers[layer]
            begin = segment.length - lacking
            parts.insert(0, (known_keys[:, begin:], known_values[:, begin:]))
            num_tokens += lacking
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)

    def commit(self, num_tokens: int) -> None:
        """The last forward succeeded: its tokens are now part of the row."""
        self.length += num_tokens

    def fork(self) -> RowCache:
        """Another row that continues from here: choices of one request share the prefill of their prompt.

        What this row has read becomes a segment of both, without the room that its buffers had for more.
        """
        num_own = self.length - self.num_shared
        if num_own:
            own = {}
            while self._layers:  # layer by layer, so that never two copies of all are there
                layer, (keys, values) = self._layers.popitem()
                own[layer] = (keys[:, :num_own].clone(), values[:, :num_own].clone())
            self.shared, self.num_shared, self._layers = (*self.shared, Segment(num_own, own)), self.length, {}
            self.num_bytes = 0
        return RowCache(self.shared)

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`; others that share segments keep theirs."""
        assert num_tokens <= self.length, f"only {self.length} tokens are known, not {num_tokens}"
        if num_tokens < self.num_shared:
            self._layers, self.num_bytes = {}, 0
            kept, left = [], num_tokens
            for segment in self.shared:
                if left <= 0:
                    break
                kept.append(segment if segment.length <= left else segment.beginning(left))
                left -= segment.length
            self.shared, self.num_shared = tuple(kept), num_tokens
        self.length = num_tokens

    def copy_to(self, num_tokens: int, num_more: int = 0) -> RowCache:
        """Another row that continues after the first `num_tokens`, with memory of its own for what is not shared.

        `num_more`: how many tokens it is going to read, if it has memory for these and no others."""
        num_own = max(0, num_tokens - self.num_shared)
        twin = RowCache(self.shared, num_planned=num_own + num_more if num_more else 0)
        if num_tokens < self.num_shared:
            twin.truncate(num_tokens)
            return twin
        for layer, (keys, values) in self._layers.items() if num_own else ():
            twin.extend(layer, keys[:, :num_own], values[:, :num_own])
        twin.commit(num_own)
        return twin

    def append(self, pieces: Sequence[LayerSlices], end: int) -> None:
        """Continue with what another row has read. `pieces`, one behind the other, hold the tokens from the first on;
        those up to place `end` that are not known yet are copied."""
        for layer, (keys, values) in joined(pieces, end).layers.items():
            self.extend(layer, keys[:, self.length :], values[:, self.length :])
        self.commit(end - self.length)

    def copy_of(self, begin: int, end: int) -> LayerSlices:
        """Keys and values of the tokens in places `begin` to `end`, per layer, in memory of their own."""
        assert end <= self.length, f"only {self.length} tokens are known, not {end}"
        copies = {}
        for layer, own in self._layers.items():
            first = self.num_shared
            if begin < first:
                own, first = self.with_shared(layer, *own), 0
            copies[layer] = tuple(whole[:, begin - first : end - first].clone() for whole in own)
        return copies

    @property
    def capacity(self) -> int:
        """How many tokens of its own there is memory for."""
        return next((keys.shape[1] for keys, _ in self._layers.values()), 0)

    @property
    def num_layers(self) -> int:
        """How many layers have left keys of the row's own here."""
        return len(self._layers)

    def _grow(self, layer: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        capacity = self._num_planned if end <= self._num_planned else in_blocks(end)
        grown = (
            keys.new_empty(keys.shape[0], capacity, keys.shape[2]),
            values.new_empty(values.shape[0], capacity, values.shape[2]),
        )
        self.num_bytes += grown[0].nbytes + grown[1].nbytes
        if layer in self._layers:
            self.num_bytes -= sum(old.nbytes for old in self._layers[layer])
            for old, new in zip(self._layers[layer], grown, strict=True):
                new[:, : old.shape[1]] = old
        self._layers[layer] = grown


def in_blocks(num_tokens: int) -> int:
    """For how many tokens a buffer has room that is to hold so many: 1 -> 128"""
    return -(-num_tokens // GROWTH) * GROWTH


def held_bytes(caches: Iterable[RowCache]) -> int:
    """Of these caches together: one that is there twice, and what several share, count once."""
    own = {id(cache): cache for cache in caches}
    shared = {id(segment): segment for cache in own.values() for segment in cache.shared}
    return sum(cache.num_bytes for cache in own.values()) + sum(segment.num_bytes for segment in shared.values())


def joined(pieces: Sequence[LayerSlices], end: int) -> Segment:
    """The first `end` tokens of `pieces`, which stand one behind the other, in memory of their own."""

    def whole(layer: int, i: int) -> torch.Tensor:
        parts, left = [], end
        for piece in pieces:
            parts.append(piece[layer][i][:, :left])
            left -= parts[-1].shape[1]
        return torch.cat(parts, dim=1)

    return Segment(end, {layer: (whole(layer, 0), whole(layer, 1)) for layer in pieces[0]})
