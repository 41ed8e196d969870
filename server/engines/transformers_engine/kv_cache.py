"""The KV cache of one row: what one member remembers of one request.

One row, one growing buffer per layer: nothing is padded to the longest request, and freeing a row is dropping it.
Layers are allocated at their first use, from the keys they are given, so layers of different shapes need no
description. Sliding-window layers keep all their keys too; only the attention looks back less far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

LayerSlices = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys, values: (num_kv_heads, n, head_dim)

GROWTH = 128  # tokens by which a buffer grows at least; growing copies, so it is worth doing rarely


class RowCache:
    def __init__(self) -> None:
        self.length = 0  # tokens whose keys are in every layer
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write n new tokens behind the `length` known ones; returns views of all keys and values of the layer.

        keys, values: (num_kv_heads, n, head_dim) -> (num_kv_heads, length + n, head_dim). `length` does not move
        until `commit`: a forward that fails half-way can be repeated.
        """
        end = self.length + keys.shape[1]
        if layer not in self._layers or self._layers[layer][0].shape[1] < end:
            self._grow(layer, end, keys, values)
        all_keys, all_values = self._layers[layer]
        all_keys[:, self.length : end] = keys
        all_values[:, self.length : end] = values
        return all_keys[:, :end], all_values[:, :end]

    def commit(self, num_tokens: int) -> None:
        """The last forward succeeded: its tokens are now part of the row."""
        self.length += num_tokens

    def fork(self) -> RowCache:
        """A copy that continues on its own: choices of one request share the prefill of their prompt."""
        copy = RowCache()
        copy.length = self.length
        copy._layers = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in self._layers.items()}
        return copy

    def append(self, pieces: Sequence[LayerSlices], end: int) -> None:
        """Continue with what another row has read. `pieces`, one behind the other, hold the tokens from the first on;
        those up to place `end` that are not known yet are copied."""
        for layer in pieces[0]:
            keys, values = (torch.cat([piece[layer][i] for piece in pieces], dim=1) for i in (0, 1))
            self.extend(layer, keys[:, self.length : end], values[:, self.length : end])
        self.commit(end - self.length)

    def copy_of(self, begin: int, end: int) -> LayerSlices:
        """Keys and values of the tokens in places `begin` to `end`, per layer, in memory of their own."""
        assert end <= self.length, f"only {self.length} tokens are known, not {end}"
        return {
            layer: (keys[:, begin:end].clone(), values[:, begin:end].clone())
            for layer, (keys, values) in self._layers.items()
        }

    @property
    def num_layers(self) -> int:
        """How many layers have left keys here."""
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers.values())

    def _grow(self, layer: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        capacity = -(-end // GROWTH) * GROWTH
        grown = tuple(new.new_empty(new.shape[0], capacity, new.shape[2]) for new in (keys, values))
        if layer in self._layers:
            for old, new in zip(self._layers[layer], grown, strict=True):
                new[:, : self.length] = old[:, : self.length]
        self._layers[layer] = grown
