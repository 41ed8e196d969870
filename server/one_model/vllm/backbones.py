"""Which members stand on which weights, and how vLLM builds them.

Members of one `path` are one backbone: a `SeparateMember`, or a `SharedBase` as soon as one of them has an adapter or
there are several. Every member has attention layers and a KV cache of its own under vLLM's manager.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

Member = Mapping[str, Any]  # one entry of config.json's `members`: name, path, adapter, dtype, weight


class Backbone(Protocol):
    """What the ensemble's model asks of each of its backbones (an `nn.Module` with a `load_weights` that vLLM calls).

    `members`: indices into the directory's members, in order. `hidden_size`: of one member.
    """

    members: tuple[int, ...]
    hidden_size: int

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: (T,). -> (members, T, hidden_size): the hidden states that the heads read."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(members, N, hidden_size) -> (members, N, padded vocabulary); None where vLLM gathers logits elsewhere."""


def groups(members: Sequence[Member]) -> list[tuple[int, ...]]:
    """Indices of the members of each backbone: those of one path, in the order of their first one."""
    by_path: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        by_path.setdefault(member["path"], []).append(index)
    return [tuple(group) for group in by_path.values()]
