"""The posterior pool's evidence, kept in vLLM's paged KV cache as one more layer beside the members' keys and values.

For every token of every request a page holds, in the order of the members,

    hidden            H_k each   the hidden states that the next token is judged by, in the members' dtype
    log_likelihoods   K float64  log p_k(text up to and including this token); serves any prior, with a share of zero
    weights           K float64  the weights after this token, for the directory's own prior and share above zero

so that evidence goes wherever keys and values go: chunks of a prompt continue from it, a hit in the prefix cache brings
it along, what preemption frees is computed again, and drafts that were rejected are overwritten. Evidence does not
depend on what a request asked for, so requests with other mixtures share pages. It costs one application of the output
heads to every token that is read, and about 5 % of the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from ensemble_server.ensembles.pooling import posterior
from ensemble_server.ensembles.probability_averaging import AUTO
from ensemble_server.server.one_model.vllm.live_requests import request_of_token
from ensemble_server.server.one_model.vllm.request_mixture import Directory
from ensemble_server.server.one_model.vllm.rows import BAYES, NUM_EXTRA, SHARED

WORD = torch.int32  # pages are made of words that arithmetic leaves alone
NUM_ROWS_AT_ONCE = 128  # tokens judged at once; a row is as wide as the vocabulary, per member
# A member that rules a token out is that far behind. Finite, so that sums of it can be taken apart again.
FLOOR_NATS = -1e6


@dataclass(frozen=True)
class PageTable:
    """vLLM's attention metadata, as far as evidence needs it. R requests, T tokens (padded ones have slot -1)."""

    starts: torch.Tensor  # (R + 1,), where each request's tokens begin
    max_query_len: int
    block_table: torch.Tensor  # (R, blocks)
    slots: torch.Tensor  # (T,)


class PageTableBuilder(AttentionMetadataBuilder[PageTable]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PageTable:
        return PageTable(
            starts=common_attn_metadata.query_start_loc,
            max_query_len=common_attn_metadata.max_query_len,
            block_table=common_attn_metadata.block_table_tensor,
            slots=common_attn_metadata.slot_mapping,
        )


class EvidenceBackend(AttentionBackend):
    """What vLLM asks of a KV layer's backend. There is no attention in it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "ENSEMBLE_EVIDENCE"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("evidence is no attention")

    @staticmethod
    def get_builder_cls() -> type[PageTableBuilder]:
        return PageTableBuilder


class EvidencePages(nn.Module, AttentionLayerBase):
    """The layer as vLLM sees it: how much room a token takes, and where the pages are."""

    def __init__(self, num_words: int, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.name = name
        self._num_words = num_words
        self.kv_cache = torch.empty(0)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return EvidenceBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self._num_words,
            head_size_v=0,
            dtype=WORD,
        )

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[2]  # (blocks, 1, tokens per block, words)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, words)"""
        return self.kv_cache[slots // self.block_size, 0, slots % self.block_size]

    def write(self, slots: torch.Tensor, words: torch.Tensor) -> None:
        """(T,), (T, words). Padding (slot -1) goes to block 0, which vLLM gives to no request."""
        slots = slots.clamp(min=0)
        self.kv_cache[slots // self.block_size, 0, slots % self.block_size] = words


class Evidence(nn.Module):
    """Follows the evidence of every token that is read, and puts the weights that it gives into the rows."""

    _prior: torch.Tensor  # (K,) float64

    def __init__(
        self,
        directory: Directory,
        member_logits: Callable[[list[torch.Tensor]], list[torch.Tensor] | None],
        widths: list[int],
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        """member_logits: the output heads, from (N, H_k) of each member to (N, V) of each. widths: the H_k."""
        super().__init__()
        self._member_logits = member_logits
        self._widths = widths
        self._num_members = len(directory.members)
        if directory.mixture.share == AUTO:
            raise ValueError("share: auto is learnt by transformers alone; export the ensemble with a share below 1")
        self._share = directory.mixture.share
        prior = torch.tensor(directory.default.weights, dtype=torch.float64)
        self.register_buffer("_prior", prior, persistent=False)
        hidden_bytes = sum(widths) * torch.finfo(vllm_config.model_config.dtype).bits // 8
        self._hidden_words = -(-hidden_bytes // WORD.itemsize)
        num_words = self._hidden_words + 2 * self._num_members * (2 if self._share else 1)
        self.pages = EvidencePages(num_words, vllm_config, f"{prefix}.evidence.0" if prefix else "evidence.0")
        # What the members said after the last token of each request in the last forward, and where that token's
        # evidence is: the next token then needs no second look at the output heads.
        self._said: list[torch.Tensor] | None = None  # (N, V) of each member
        self._said_after = torch.empty(0, dtype=torch.int32)  # (N,) slots

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden: list[torch.Tensor], columns: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, positions: (T,). hidden: (T, H_k) of each member. columns: (T, K + 2), see `rows.py`.

        -> columns whose weights are those that predict the token after each row's.
        """
        metadata = get_forward_context().attn_metadata
        if not metadata:  # a trial run
            return columns
        table: PageTable = metadata[self.pages.name]
        num_tokens = len(input_ids)
        starts = table.starts[:-1].long().clamp(max=num_tokens - 1)  # (R,)
        request = request_of_token(table.starts, num_tokens)  # (T,)
        is_first = starts[request] == torch.arange(num_tokens, device=input_ids.device)
        is_judged = positions > 0  # nothing predicts a text's first token

        slot_before = self._slot_before(table, request, positions)
        kept = self.pages.read(slot_before[starts])  # (R, words): the evidence that each request goes on from
        kept_hidden, kept_log_likelihoods, kept_weights = self._taken_apart(kept, hidden[0].dtype)
        judges = [
            torch.where(is_first[:, None], old[request], torch.cat([new[:1], new[:-1]]))
            for old, new in zip(kept_hidden, hidden, strict=True)
        ]
        gains = self._gains(judges, input_ids, is_judged, is_first, slot_before)

        is_continued = is_judged[starts, None]  # (R, 1); else the request begins here
        sums = gains.cumsum(0)
        sums_before = (sums - gains)[starts] - torch.where(is_continued, kept_log_likelihoods, 0.0)
        log_likelihoods = sums - sums_before[request]
        path = None
        if kept_weights is not None:
            path = self._path(table, torch.where(is_continued, kept_weights, self._prior), gains, is_judged)
        self._keep(table.slots[:num_tokens], hidden, log_likelihoods, path)
        return self._weighted(columns, log_likelihoods, path, table, num_tokens)

    def remember(self, logprobs: list[torch.Tensor], columns: torch.Tensor) -> None:
        """logprobs: (N, V) of each member, for rows with `columns` (N, K + 2)."""
        slots = columns[:, -1].contiguous().view(WORD)
        if logprobs[0].device.type == "cpu" and (slots >= 0).any():
            self._said, self._said_after = logprobs, slots

    def _slot_before(self, table: PageTable, request: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(T,): where the evidence of the token before each one is; of no meaning at position 0."""
        before = (positions - 1).clamp(min=0)
        size = self.pages.block_size
        index = (before // size).clamp(max=table.block_table.shape[1] - 1)
        return table.block_table[request, index].long() * size + before % size

    def _gains(
        self,
        judges: list[torch.Tensor],
        input_ids: torch.Tensor,
        is_judged: torch.Tensor,
        is_first: torch.Tensor,
        slot_before: torch.Tensor,
    ) -> torch.Tensor:
        """(T, K) float64: the log-probability that each member gave each token; 0 for tokens that are no evidence."""
        gains = torch.zeros(len(input_ids), self._num_members, dtype=torch.float64, device=input_ids.device)
        if gains.device.type != "cpu":  # shapes that depend on values would stop the device, and CUDA graphs
            found = self._judged(judges, input_ids)
            return torch.where(is_judged[:, None], found, gains)
        left = is_judged.clone()
        if self._said is not None:
            row, match = (slot_before[:, None] == self._said_after[None, :]).nonzero(as_tuple=True)
            usable = is_first[row] & is_judged[row]
            row, match = row[usable], match[usable]
            said = torch.stack([member[match, input_ids[row].long()] for member in self._said], dim=-1)
            gains[row] = said.double().clamp(min=FLOOR_NATS)
            left[row] = False
        rows = left.nonzero().flatten()
        if len(rows):
            gains[rows] = self._judged([judge[rows] for judge in judges], input_ids[rows])
        return gains

    def _judged(self, judges: list[torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
        """judges: (N, H_k) of each member. -> (N, K) float64: what they say of `input_ids` (N,)."""
        parts = []
        for start in range(0, len(input_ids), NUM_ROWS_AT_ONCE):
            some = slice(start, start + NUM_ROWS_AT_ONCE)
            logits = self._member_logits([judge[some].contiguous() for judge in judges])
            tokens = input_ids[some].long()[:, None]
            if logits is None:  # a rank that pools nothing, so its weights are not looked at
                return torch.zeros(len(input_ids), self._num_members, dtype=torch.float64, device=input_ids.device)
            logits = [member.float() for member in logits]
            said = [member.gather(-1, tokens) - member.logsumexp(-1, keepdim=True) for member in logits]
            parts.append(torch.cat(said, dim=-1))
        return torch.cat(parts).double().clamp(min=FLOOR_NATS)

    def _path(
        self, table: PageTable, weights: torch.Tensor, gains: torch.Tensor, is_judged: torch.Tensor
    ) -> torch.Tensor:
        """(T, K) float64: the weights after each token. weights: (R, K), those that each request goes on from."""
        num_tokens = len(gains)
        path = gains.new_empty(num_tokens + 1, self._num_members)  # the last row takes what no token needs
        starts, ends = table.starts[:-1].long(), table.starts[1:].long()
        for step in range(table.max_query_len):
            rows = (starts + step).clamp(max=num_tokens - 1)
            goes_on = starts + step < ends
            moved = posterior.update_rows(weights, gains[rows], self._prior, self._share)
            weights = torch.where((goes_on & is_judged[rows])[:, None], moved, weights)
            path[torch.where(goes_on, rows, num_tokens)] = weights
        return path[:num_tokens]

    def _weighted(
        self,
        columns: torch.Tensor,
        log_likelihoods: torch.Tensor,
        path: torch.Tensor | None,
        table: PageTable,
        num_tokens: int,
    ) -> torch.Tensor:
        weights, kind = columns[:, :-NUM_EXTRA], columns[:, -NUM_EXTRA, None]
        bayes = posterior.weights_of(log_likelihoods, weights.double())
        weights = torch.where(kind == BAYES, bayes.float(), weights)
        if path is not None:
            weights = torch.where(kind == SHARED, path.float(), weights)
        is_last = torch.zeros(num_tokens, dtype=torch.bool, device=columns.device)
        is_last[(table.starts[1:].long() - 1).clamp(min=0, max=num_tokens - 1)] = True
        slots = torch.where(is_last, table.slots[:num_tokens], -1).to(WORD)
        return torch.cat([weights, kind, slots.view(torch.float32)[:, None]], dim=-1)

    # --- a page's words --------------------------------------------------------------------------------------------

    def _keep(
        self,
        slots: torch.Tensor,
        hidden: list[torch.Tensor],
        log_likelihoods: torch.Tensor,
        path: torch.Tensor | None,
    ) -> None:
        states = torch.cat(hidden, dim=-1)
        if states.shape[-1] * states.element_size() % WORD.itemsize:
            states = nn.functional.pad(states, (0, 1))
        parts = [states.view(WORD), log_likelihoods.contiguous().view(WORD)]
        if path is not None:
            parts.append(path.contiguous().view(WORD))
        self.pages.write(slots, torch.cat(parts, dim=-1))

    def _taken_apart(
        self, words: torch.Tensor, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """Hidden states (R, H_k) of each member, log-likelihoods (R, K) float64, weights (R, K) float64 if kept."""
        states, *numbers = words.split([self._hidden_words, *[2 * self._num_members] * (2 if self._share else 1)], -1)
        states = states.contiguous().view(dtype)[:, : sum(self._widths)]
        log_likelihoods, *weights = [part.contiguous().view(torch.float64) for part in numbers]
        return list(states.split(self._widths, dim=-1)), log_likelihoods, weights[0] if weights else None
