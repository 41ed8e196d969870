"""Attention over many rows in one forward.

The tokens of all rows, prompt chunks and single decode tokens alike, lie side by side in one sequence of a batch of
one, so that every linear layer of the model runs once, on all of them. Only attention must tell the rows apart: it
is registered with transformers as an attention implementation and lets each row look at its own cache.

What rows share (`kv_cache.Segment`) is looked at once for all of them: attention over a row's tokens is the mean of
attention over its parts, weighted with the parts' sums of exponentials, so every part can be taken by itself. With a
prompt's beginning of a thousand tokens that saves most of what a decode step reads from memory. The idea is that of
Juravsky et al., "Hydragen: High-throughput LLM inference with shared prefixes", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache, Segment

IMPLEMENTATION = "ensemble_rows"


@dataclass
class Span:
    """Consecutive new tokens of one row. `num_keep`: for how many of the last of them logits are wanted."""

    cache: RowCache
    token_ids: Sequence[int]
    num_keep: int
    adapter: str | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def start(self) -> int:
        """Position of the first token in its row."""
        return self.cache.length

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor:
        """(n_new, n_all) bool, True where a token may look: backwards, at most `window` tokens including itself."""
        if window not in self._masks:
            positions = torch.arange(self.start + len(self.token_ids), device=device)
            distance = positions[self.start :, None] - positions[None, :]
            allowed = distance >= 0
            self._masks[window] = allowed if window is None else allowed & (distance < window)
        return self._masks[window]


@dataclass(frozen=True)
class Level:
    """Segments that stand at one depth of their rows, each with the places of the tokens that look at it."""

    segments: Sequence[tuple[Segment, torch.Tensor]]
    places: torch.Tensor  # of all of them, in the segments' order


class Rows:
    """The spans of one forward, and what they share."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = spans
        levels: list[dict[Segment, list[int]]] = []
        begin = 0
        for span in spans:
            end = begin + len(span.token_ids)
            for depth, segment in enumerate(span.cache.shared):
                if depth == len(levels):
                    levels.append({})
                levels[depth].setdefault(segment, []).extend(range(begin, end))
            begin = end
        self.levels = [
            Level(
                [(segment, torch.tensor(places, device=device)) for segment, places in level.items()],
                torch.tensor([place for places in level.values() for place in places], device=device),
            )
            for level in levels
        ]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rows: Rows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query: (1, num_heads, T, head_dim), key/value with num_kv_heads.

    `rows` comes through the model's keyword arguments; an architecture that does not pass them on fails here, and
    so does one that wants something of its attention that is not built here. -> (1, T, num_heads, head_dim)
    """
    for feature in ("softcap", "s_aux"):
        if unused.get(feature) is not None:
            raise NotImplementedError(f"attention with {feature}")
    layer: Any = module.layer_idx  # torch knows of a module's attributes tensors and modules only
    if rows.levels and sliding_window is None:
        output = _in_parts(layer, query[0], key[0], value[0], rows, scaling)[None]
    else:
        output = _row_by_row(layer, query, key, value, rows.spans, scaling, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def _row_by_row(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """-> (1, num_heads, T, head_dim)"""
    outputs = []
    begin = 0
    for span in spans:
        end = begin + len(span.token_ids)
        keys, values = span.cache.extend(layer, key[0, :, begin:end], value[0, :, begin:end])
        is_single = end - begin == 1
        if span.cache.shared:
            keys, values = span.cache.with_shared(layer, keys, values, sliding_window if is_single else None)
        queries = query[:, :, begin:end]
        mask = None
        if is_single:  # heads that share keys stand side by side, as if they were tokens, and read them once
            queries = queries.reshape(1, keys.shape[0], -1, queries.shape[-1])
            if sliding_window is not None:
                keys, values = keys[:, -sliding_window:], values[:, -sliding_window:]
        elif span.start or sliding_window is not None:
            mask = span.mask(sliding_window, query.device)
        output = scaled_dot_product_attention(
            queries,
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and not is_single,
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[0],
        )
        outputs.append(output.reshape(1, query.shape[1], end - begin, -1))
        begin = end
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _in_parts(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scaling: float | None
) -> torch.Tensor:
    """Each row's own tokens by themselves, each segment for all its rows. query: (num_heads, T, head_dim), and so is
    what is returned."""
    parts = []
    begin = 0
    for span in rows.spans:
        end = begin + len(span.token_ids)
        keys, values = span.cache.extend(layer, key[:, begin:end], value[:, begin:end])
        mask = span.mask(None, query.device)[:, span.cache.num_shared :] if end - begin > 1 else None
        parts.append(partial_attention(query[:, begin:end], keys, values, mask, scaling))
        begin = end
    output = torch.cat([part for part, _ in parts], dim=1).float()
    log_sums = torch.cat([log_sum for _, log_sum in parts], dim=1)
    for level in rows.levels:
        parts = [
            partial_attention(query[:, places], *segment.layers[layer], None, scaling)
            for segment, places in level.segments
        ]
        new_output = torch.cat([part for part, _ in parts], dim=1).float()
        new_log_sums = torch.cat([log_sum for _, log_sum in parts], dim=1)
        old_log_sums = log_sums[:, level.places]
        total = torch.logaddexp(old_log_sums, new_log_sums)
        output[:, level.places] = (
            output[:, level.places] * (old_log_sums - total).exp()[..., None]
            + new_output * (new_log_sums - total).exp()[..., None]
        )
        log_sums[:, level.places] = total
    return output.to(query.dtype)


def partial_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a part of what a token looks at, and how much that part weighs.

    query: (num_heads, n, head_dim); keys, values: (num_kv_heads, m, head_dim); mask: (n, m) bool or None for all.
    -> (num_heads, n, head_dim), and (num_heads, n) float32: the logarithm of the sum of exponentials of the scores
    """
    num_heads, num_tokens, head_dim = query.shape
    num_groups = num_heads // keys.shape[0]
    if mask is None:  # heads that share keys stand side by side, as if they were tokens
        query = query.reshape(keys.shape[0], num_groups * num_tokens, head_dim)
    elif num_groups > 1:
        keys, values = keys.repeat_interleave(num_groups, dim=0), values.repeat_interleave(num_groups, dim=0)
    scale = head_dim**-0.5 if scaling is None else scaling
    bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if (
        query.device.type == "cpu" and values.shape[-1] == head_dim
    ):  # what scaled_dot_product_attention calls there; only this tells the sums
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sum = flash(query[None], keys[None], values[None], attn_mask=bias, scale=scale)
        output, log_sum = output[0], log_sum[0]
    else:
        scores = (query @ keys.transpose(1, 2)).float() * scale
        scores = scores if bias is None else scores + bias
        log_sum = scores.logsumexp(-1)
        output = (scores - log_sum[..., None]).exp().to(values.dtype) @ values
    return output.reshape(num_heads, num_tokens, -1), log_sum.reshape(num_heads, num_tokens)


AttentionInterface.register(IMPLEMENTATION, attend)
