"""The ensemble as a vLLM model: every backbone forwards the same tokens, and their distributions are pooled.

The scheduler, paged KV, sampler and server are vLLM's. A forward returns each token's hidden states of all members and
how they are to be pooled (`rows.py`); `compute_logits` turns such rows into the mixture's log-probabilities, float32
and normalised, over the tokenizer's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import AutoWeightsLoader

from ensemble_server.server.one_model.vllm.backbone import Backbone
from ensemble_server.server.one_model.vllm.backbones import build_backbones, directory_of
from ensemble_server.server.one_model.vllm.evidence import Evidence
from ensemble_server.server.one_model.vllm.live_requests import LiveRequests, request_of_token
from ensemble_server.server.one_model.vllm.request_mixture import Directory
from ensemble_server.server.one_model.vllm.rows import columns_of, kind_of, mix, packed, unpacked

# Rows whose distributions are held at once, per member: (ROWS, V) float32 is 50 to 150 MB for usual vocabularies.
NUM_ROWS_AT_ONCE = 256


class EnsembleForCausalLM(nn.Module):
    """Made by vLLM's loader from an exported directory. LoRA and pipeline parallelism are refused by vLLM, since the
    interfaces that offer them are missing here.
    """

    _default_columns: torch.Tensor  # (1, K + 2) float32
    _requests: LiveRequests | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.directory = Directory.of(hf_config)
        self.vocab_size: int = hf_config.vocab_size
        backbones = build_backbones(
            vllm_config, hf_config.members, directory_of(vllm_config.model_config.model), prefix
        )
        for name, backbone in backbones.items():
            setattr(self, name, backbone)
        self._names = list(backbones)
        self.secondary_weights = [source for backbone in backbones.values() for source in backbone.secondary_weights]
        # The directory's own weight file holds this one tensor: vLLM's loader wants a file there.
        self.prior = nn.Parameter(
            torch.tensor(self.directory.default.weights, dtype=torch.float32), requires_grad=False
        )
        self.register_buffer("_default_columns", _one_row(self.directory), persistent=False)
        by_member = {index: backbone for backbone in backbones.values() for index in backbone.members}
        self._widths = [by_member[index].hidden_size for index in range(len(hf_config.members))]
        self._requests = None
        self._default_kinds = frozenset({kind_of(self.directory.default)})
        self.evidence = None
        if self.directory.keeps_evidence:
            self.evidence = Evidence(self.directory, self.member_logits, self._widths, vllm_config, prefix)

    def follow_requests(self, requests: LiveRequests) -> None:
        """From now on ask `requests` how the rows of each forward are to be pooled."""
        self._requests = requests

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's interface. Members embed the ids themselves, each in its own way."""
        raise NotImplementedError("an ensemble takes token ids, not embeddings: every member has its own")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids, positions: (T,). -> rows (T, sum of widths and columns), see `rows.py`.

        columns: (T, K + 2) float32 from the model state of vLLM's V2 runner; the V1 runner leaves it out.
        """
        parts: dict[int, torch.Tensor] = {}
        for backbone in self._backbones():
            parts |= zip(backbone.members, backbone(input_ids, positions), strict=True)
        hidden = [parts[index] for index in range(len(self._widths))]
        wanted: torch.Tensor = self._columns(len(input_ids)) if columns is None else columns
        if self.evidence is not None:
            wanted = self.evidence(input_ids, positions, hidden, wanted)
        return packed(hidden, wanted)

    def compute_logits(self, rows: torch.Tensor) -> torch.Tensor | None:
        """rows: (N, sum of widths and columns). -> (N, V) float32; None on ranks where vLLM gathers no logits."""
        kinds = self._default_kinds if self._requests is None else self._requests.kinds
        mixed = []
        for some in rows.split(NUM_ROWS_AT_ONCE):
            hidden, columns = unpacked(some, self._widths)
            logits = self.member_logits(hidden)
            if logits is None:
                return None
            logprobs = [torch.log_softmax(member.float(), dim=-1) for member in logits]
            if self.evidence is not None:
                self.evidence.remember(logprobs, columns)
            mixed.append(mix(logprobs, columns, kinds))
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def member_logits(self, hidden: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """hidden: (N, H_k) of each member. -> (N, V) of each member, without the padding of its vocabulary."""
        logits: dict[int, torch.Tensor] = {}
        for backbone in self._backbones():
            found = backbone.compute_logits(torch.stack([hidden[index] for index in backbone.members]))
            if found is None:
                return None
            logits |= zip(backbone.members, found, strict=True)
        return [logits[index][..., : self.vocab_size] for index in range(len(hidden))]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def get_model_state_cls(self) -> type:
        """Asked by vLLM's V2 runner, which V1 runners do not import."""
        from ensemble_server.server.one_model.vllm.model_state import EnsembleState

        return EnsembleState

    def _backbones(self) -> list[Backbone]:
        return [getattr(self, name) for name in self._names]

    def _columns(self, num_rows: int) -> torch.Tensor:
        """(T, K + 2): what the live requests ask for, each token's request looked up in vLLM's attention metadata."""
        metadata = get_forward_context().attn_metadata
        by_request = self._requests.columns() if self._requests is not None and metadata else None
        if by_request is None:  # all want the directory's mixture, or this is a trial run without requests
            return self._default_columns.expand(num_rows, -1)
        starts = next(iter(metadata.values())).query_start_loc
        return by_request[request_of_token(starts[: len(by_request) + 1], num_rows)]


def _one_row(directory: Directory) -> torch.Tensor:
    """(1, K + 2): the columns of requests that say nothing."""
    return torch.tensor([columns_of(directory.default)], dtype=torch.float32)
