"""What the ensemble's model asks of a backbone: one set of weights, and the members that stand on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

Member = Mapping[str, Any]  # one entry of config.json's `members`: name, path, adapter, dtype, weight


class Backbone(Protocol):
    """What the ensemble's model asks of each of its backbones (an `nn.Module`).

    `members`: indices into the directory's members, in order. `hidden_size`: of one member. `secondary_weights`: what
    vLLM's loader is to read; `load_weights` then gets all of it, without the prefix.
    """

    members: tuple[int, ...]
    hidden_size: int
    secondary_weights: list[DefaultModelLoader.Source]

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: (T,). -> (members, T, hidden_size): the hidden states that the heads read."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(members, N, hidden_size) -> (members, N, padded vocabulary); None where vLLM gathers logits elsewhere."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The names of the parameters that were filled, as they are called below this module."""
        ...
