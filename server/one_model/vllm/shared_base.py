"""A backbone of several members on one base: the base's weights are read once for all of them.

Each token becomes one row per member. Linear layers run on all rows and add each member's low-rank change; attention
holds the members side by side as heads, each with its own keys and values. The result is exact: it is what every member
gives alone, up to rounding. `shared_base_layers.py` says how.

Cost on top of one member: K times the arithmetic and the KV cache, but the same weights. So it is cheap where reading
weights is what takes the time (few requests at once), and K times as much where arithmetic is (long prompts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model

from ensemble_server.server.one_model.vllm.backbone import Member
from ensemble_server.server.one_model.vllm.shared_base_adapters import LowRank, read_adapter
from ensemble_server.server.one_model.vllm.shared_base_layers import add_changes, members_as_heads, put_side_by_side


# subtle: compiled as one graph, with the base inside. The base alone is marked for compilation, too, but would see K
# rows where vLLM counts one token.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1})
class SharedBase(nn.Module):
    """See `backbone.Backbone`. A member without an adapter is the base itself."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        members: Sequence[Member],
        indices: tuple[int, ...],
        checkpoint: Path,
        folder: Path,
        prefix: str,
    ) -> None:
        """vllm_config: the base's own. indices: of `members` in the directory, which is `folder`.

        Raises `ModelLoadError` for adapters, and bases, whose members cannot be told apart row by row.
        """
        super().__init__()
        self.members = indices
        self.hidden_size = vllm_config.model_config.get_hidden_size()
        self.secondary_weights = [DefaultModelLoader.Source(str(checkpoint), None, prefix=f"{prefix}.")]
        config = vllm_config.model_config.hf_config
        changes = [
            read_adapter(member["name"], folder / member["adapter"], config) if member["adapter"] else {}
            for member in members
        ]
        config.ensemble_ranks = _ranks(changes)  # compiled code has their shapes, so its cache must go by them
        with members_as_heads(len(members)):
            self.base = initialize_model(vllm_config=vllm_config, prefix=prefix)
        put_side_by_side(self.base, len(members))
        add_changes(self.base, changes, [member["name"] for member in members])

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        num_members = len(self.members)
        rows = self.base(
            input_ids.repeat_interleave(num_members), positions.repeat_interleave(num_members, dim=-1), None, None
        )
        return rows.view(-1, num_members, self.hidden_size).transpose(0, 1)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) -> (K, T, hidden_size): members of one base embed alike."""
        return self.base.embed_input_ids(input_ids).expand(len(self.members), -1, -1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = self.base.compute_logits(hidden.reshape(-1, self.hidden_size))
        return None if logits is None else logits.view(*hidden.shape[:2], -1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """weights: of the base, by the names of its checkpoint."""
        return {f"base.{name}" for name in self.base.load_weights(weights)}


def _ranks(changes: Sequence[Mapping[str, LowRank]]) -> list[dict[str, int]]:
    return [{path: len(change.a) for path, change in member.items()} for member in changes]
