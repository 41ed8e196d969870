"""How the layers of one base take the rows of several members at once.

Rows are token-major: row `t * K + k` is member k's view of token t. So a tensor (T * K, width) seen as (T, K * width)
holds the members side by side, without a copy, and that is what attention gets:

- linear layers run once on all T * K rows; each member's low-rank change is added (`add_changes`);
- an attention layer has K times the heads: member k owns the k-th part of the query heads, of the heads for keys and
  values, and so of the KV cache, where vLLM keeps its pages like those of any model (`members_as_heads`).

Everything else in a transformer works on each row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.v1.attention.backend import AttentionType

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.one_model.vllm.shared_base_adapters import LowRank

# --- attention ----------------------------------------------------------------------------------------------------


@contextmanager
def members_as_heads(num_members: int) -> Iterator[None]:
    """Within it, every `Attention` that a model builds has `num_members` times the heads that the model asks for.

    subtle: vLLM's models build their attention themselves, and an implementation's settings cannot be read back from
    it, so the constructor is where the number of heads can be changed for every architecture.
    """
    build = Attention.__init__

    @wraps(build)
    def build_for_all(
        self: Attention,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        *args: Any,
        **settings: Any,
    ) -> None:
        if settings.get("sinks") is not None:
            raise ModelLoadError("members of one base cannot have attention sinks in vLLM; merge the adapters instead")
        slopes = None if alibi_slopes is None else list(alibi_slopes) * num_members
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        build(self, num_heads * num_members, head_size, scale, kv_heads * num_members, slopes, *args, **settings)

    Attention.__init__ = build_for_all
    try:
        yield
    finally:
        Attention.__init__ = build


class SideBySide(nn.Module):
    """An attention layer with all members' heads, called by a model that sees one row per token and member."""

    def __init__(self, attention: Attention, num_members: int) -> None:
        super().__init__()
        self.attention, self.num_members = attention, num_members

    def forward(
        self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, **settings: Any
    ) -> torch.Tensor:
        """query: (T * K, width), key, value: (T * K, kv width) or None where a layer reads another's. -> like query"""
        key, value = (None if rows is None else self._by_token(rows) for rows in (key, value))
        attended = self.attention(self._by_token(query), key, value, **settings)
        return attended.view(attended.shape[0] * self.num_members, -1)

    def _by_token(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(rows.shape[0] // self.num_members, -1)


def put_side_by_side(base: nn.Module, num_members: int) -> None:
    """Let each attention layer of `base`, built within `members_as_heads`, take rows.

    Raises `ModelLoadError` for layers that keep state of another kind (Mamba, MLA, cross-attention).
    """
    found = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, AttentionLayerBase)]
    for name, layer in found:
        if not isinstance(layer, Attention) or layer.attn_type != AttentionType.DECODER:
            raise ModelLoadError(
                f"members of one base cannot share {name}, a {type(layer).__name__}: only causal attention with a KV "
                "cache can be told apart by heads; merge each adapter into a model of its own (PEFT's merge_and_unload)"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(parent), attribute, SideBySide(layer, num_members))


# --- linear layers ------------------------------------------------------------------------------------------------


class LowRankRows(LinearMethodBase):
    """A linear layer's own method, and each member's low-rank change on its rows.

    Two batched products, one matrix per member. Members before the first and after the last that change the layer are
    left out, so a base that comes first costs nothing here.
    """

    def __init__(self, method: QuantizeMethodBase, num_members: int, changed: slice) -> None:
        """changed: the members that the layer's `changes` are of."""
        self.method, self.num_members, self.changed = method, num_members, changed
        self.requires_device_loading = method.requires_device_loading
        self.uses_meta_device = method.uses_meta_device
        self.supports_pre_processed_weights = method.supports_pre_processed_weights

    def create_weights(self, layer: nn.Module, *args: Any, **settings: Any) -> None:
        self.method.create_weights(layer, *args, **settings)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: (T * K, in) -> (T * K, out)"""
        y = self.method.apply(layer, x, bias)
        low = torch.bmm(self._of_members(x), layer.changes.a)
        self._of_members(y).baddbmm_(low, layer.changes.b)
        return y

    def _of_members(self, rows: torch.Tensor) -> torch.Tensor:
        """(T * K, width) -> (changed members, T, width), a view"""
        return rows.view(-1, self.num_members, rows.shape[-1])[:, self.changed].transpose(0, 1)


def add_changes(base: nn.Module, members: Sequence[Mapping[str, LowRank]], names: Sequence[str]) -> None:
    """Give the linear layers of `base` the members' changes: one mapping per member, empty for the base itself.

    Raises `ModelLoadError` naming the member for a change to anything but a linear layer of the blocks.
    """
    places = _places(base)
    by_layer: dict[str, list[tuple[int, LowRank, int | str | None]]] = {}
    for index, (changes, name) in enumerate(zip(members, names, strict=True)):
        for path, change in changes.items():
            if path not in places:
                raise ModelLoadError(
                    f"adapter of member {name!r} changes {path}, which is no linear layer of the base in vLLM; "
                    "merge it into a model of its own (PEFT's merge_and_unload)"
                )
            layer_name, shard = places[path]
            by_layer.setdefault(layer_name, []).append((index, change, shard))
    for layer_name, changes in by_layer.items():
        _add(base.get_submodule(layer_name), changes, len(members))


def _places(base: nn.Module) -> dict[str, tuple[str, int | str | None]]:
    """Name of a linear layer in transformers -> its layer in vLLM, and which part of that: "q", "k", "v", a number."""
    packed = getattr(base, "packed_modules_mapping", {})
    places: dict[str, tuple[str, int | str | None]] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, attribute = name.rpartition(".")
        parts = packed.get(attribute, [attribute])
        for index, part in enumerate(parts):
            shard = None if len(parts) == 1 else "qkv"[index] if isinstance(layer, QKVParallelLinear) else index
            places[f"{parent}.{part}"] = (name, shard)
    return places


def _add(layer: LinearBase, changes: Sequence[tuple[int, LowRank, int | str | None]], num_members: int) -> None:
    """subtle: the layer's own loader puts each part into place, since it knows how ranks split inputs and outputs."""
    owners = [member for member, _, _ in changes]
    changed = slice(min(owners), max(owners) + 1)
    a: list[list[torch.Tensor]] = [[] for _ in range(num_members)]
    b: list[list[torch.Tensor]] = [[] for _ in range(num_members)]
    for member, change, shard in changes:
        rank = len(change.a)
        is_split = isinstance(layer, RowParallelLinear)
        a_part = _empty(layer, rank, layer.input_size_per_partition if is_split else layer.input_size, input_dim=1)
        if is_split:
            layer.weight_loader(a_part, change.a.to(a_part))
        else:
            a_part.data.copy_(change.a)
        b_part = _empty(layer, sum(layer.output_partition_sizes), rank, output_dim=0)
        layer.weight_loader(b_part, change.b.to(b_part), *(() if shard is None else (shard,)))
        a[member].append(a_part.data.T)
        b[member].append(b_part.data.T)
    # subtle: in a module of their own, since vLLM counts a layer's tensors to see when it has read them all
    layer.changes = nn.Module()
    layer.changes.register_buffer("a", _stacked(a[changed], dim=1), persistent=False)  # (changed, in, rank)
    layer.changes.register_buffer("b", _stacked(b[changed], dim=0), persistent=False)  # (changed, rank, out)
    layer.quant_method = LowRankRows(layer.quant_method, num_members, changed)
    layer.requires_unquantized_input = True  # the products need x as it is


def _stacked(parts: Sequence[Sequence[torch.Tensor]], dim: int) -> torch.Tensor:
    """One matrix per member: its parts side by side along `dim`, the rank, with zeros up to the largest rank."""
    rank = max(sum(part.shape[dim] for part in member) for member in parts)
    some = next(part for member in parts for part in member)
    shape = [len(parts), *some.shape]
    shape[dim + 1] = rank
    stacked = some.new_zeros(shape)
    for matrix, member in zip(stacked, parts, strict=True):
        if member:
            whole = torch.cat(list(member), dim=dim)
            matrix.narrow(dim, 0, whole.shape[dim]).copy_(whole)
    return stacked


def _empty(layer: LinearBase, *shape: int, **dims: int) -> nn.Parameter:
    """Zeros where the layer's weights are, with the marks that vLLM's loaders look for."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=layer.params_dtype), requires_grad=False)
    for name, dim in dims.items():
        setattr(parameter, name, dim)
    return parameter
