"""`config.json` of an ensemble directory.

    {"model_type": "ensemble", "pool": "arithmetic", "share": 0.0,
     "members": [{"name": "base", "path": "HuggingFaceTB/SmolLM2-135M-Instruct", "adapter": null, "dtype": "float32",
                  "weight": 1.0}, ...],
     "vocab_size": 49152, "hidden_size": 2304, "num_hidden_layers": 120, ...}

`path` is a hub id or a folder, `adapter` a folder with a PEFT LoRA adapter; relative ones start at the directory.
`dtype` is that of the weights, or auto for the one they were saved in. The sizes are what tools ask of any model:
layers and width are sums over members, since each has its own KV cache.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from ensemble_server.ensembles.base import Mixture, PoolName
from ensemble_server.ensembles.probability_averaging import mixture_of


class EnsembleConfig(PreTrainedConfig):
    """`members`: one map per member with the keys name, path, adapter (or null), dtype and weight."""

    model_type = "ensemble"

    members: list[dict[str, Any]] = field(default_factory=list)
    pool: PoolName = "arithmetic"
    share: float | str = 0.0
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0

    @property
    def mixture(self) -> Mixture:
        """Weights by member's name, pool and share. Raises `ValueError` if they do not fit each other."""
        share: Any = self.share  # a word other than "auto" is refused with the rest
        return mixture_of({member["name"]: member["weight"] for member in self.members}, self.pool, share)
