"""One set of weights, loaded once: a transformers causal LM that forwards many rows at a time.

Several members can stand on one backbone: the bare base, its LoRA adapters and deltas, and further views of these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.transformers_engine.adapters import AdapterRows, stack_adapters
from ensemble_server.server.engines.transformers_engine.attention import IMPLEMENTATION, Rows, Span
from ensemble_server.server.engines.transformers_engine.deltas import stack_deltas
from ensemble_server.server.engines.transformers_engine.half_weights import (
    WeightsRule,
    halve_embeddings,
    halving,
    is_supported,
    round_to_half,
)
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.packed_linear import pack_linears
from ensemble_server.server.weights.causal_lm import load_causal_lm
from ensemble_server.server.weights.checkpoint_facts import id_set, max_positions

logger = logging.getLogger(__name__)

CHECK_TOKENS = 24  # length of the text on which a freshly loaded model is compared with its own plain forward
TOLERANCE_NATS = {torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE_NATS = 0.5


class Backbone:
    """`vocab_size`: how many ids count. The tokenizer's, since logits are often padded to a rounder width.
    `num_parameters`: with all adapters, before any is packed.

    `weights`: which are kept as fp16, on a CPU, while they are computed with as float32.
    """

    def __init__(
        self, model: PreTrainedModel, adapters: AdapterRows | None, vocab_size: int, weights: WeightsRule
    ) -> None:
        self.model = model
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        embeddings: Any = model.get_input_embeddings()  # "a module", say its types
        self.vocab_size: int = min(vocab_size, embeddings.weight.shape[0])
        self._adapters = adapters
        self._at_head: AdapterRows | None = None  # of the tokens that logits are wanted of; with deltas
        self._weights: WeightsRule = weights
        self.kv_bytes_per_token = 0  # of one row, all layers; known once it has been tried

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str,
        device: str,
        adapters: Mapping[str, Path],
        deltas: Mapping[str, Path] | None = None,
        vocab_size: int,
        weights: WeightsRule = "exact",
    ) -> Backbone:
        """Load a model folder, its adapters (name -> PEFT folder) and deltas (name -> folder of `ensemble compress`),
        and check that this engine computes it rightly.

        Raises `ModelLoadError` naming the rule that is broken; the caller knows the member's name.
        """
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load_causal_lm(folder, dtype=torch_dtype, device=device).eval()
        deltas = deltas or {}
        rows = stack_adapters(model, adapters, list(deltas)) if adapters or deltas else None
        backbone = cls(model.requires_grad_(False), rows, vocab_size, weights)
        if rows is not None and deltas:
            backbone._at_head = AdapterRows(rows.names)
            stack_deltas(model, deltas, rows, backbone._at_head)
        backbone._prepare(folder)
        return backbone

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """End-of-text ids that the checkpoint's generation config names."""
        config = self.model.generation_config
        return frozenset() if config is None else id_set(config.eos_token_id)

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.model.config.get_text_config())

    def halving(self) -> Iterator[None]:
        """Makes steps of few tokens faster, a piece with each `next`: see `half_weights.halving`. On the thread that
        calls `forward`."""
        return iter(()) if self._weights == "full" else halving(self.model)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        """Run all spans at once and add their tokens to their caches.

        Returns, per span, log-probabilities (num_keep, vocab_size) float32, normalised over the first `vocab_size`
        ids (padding columns are cut before, not after, so no mass leaks into them).
        """
        ids = torch.tensor([[token for span in spans for token in span.token_ids]], device=self.device)
        positions = torch.tensor(
            [[span.start + offset for span in spans for offset in range(len(span.token_ids))]], device=self.device
        )
        keep, begin = [], 0
        for span in spans:
            begin += len(span.token_ids)
            keep.extend(range(begin - span.num_keep, begin))
        self._assign([span.adapter for span in spans for _ in span.token_ids], keep)
        logits = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
            rows=Rows(spans, self.device),
        ).logits[0]
        for span in spans:
            span.cache.commit(len(span.token_ids))
        logprobs = torch.log_softmax(logits[:, : self.vocab_size].float(), dim=-1)
        return list(logprobs.split([span.num_keep for span in spans]))

    @torch.inference_mode()
    def _prepare(self, folder: Path) -> None:
        """Switch to this engine's attention and linears, and prove on a short text that nothing else changed.

        That refuses, at load, architectures whose attention or cache works in ways that rows cannot carry.
        """
        text = torch.arange(1, CHECK_TOKENS + 1) * 7919 % self.vocab_size
        self._assign([None] * CHECK_TOKENS, range(CHECK_TOKENS))
        try:
            plain = self._plain(text)
            if self._weights == "half" and is_supported() and (rounding := round_to_half(self.model)) is not None:
                rounded = self._plain(text)
                change = float((rounded - plain).abs().max())
                logger.info("%s: weights rounded to fp16: %s; that is %.2g nats at most", folder, rounding, change)
                plain = rounded
            self.model.set_attn_implementation(IMPLEMENTATION)
            pack_linears(self.model)
            if self._weights != "full" and is_supported():
                halve_embeddings(self.model)
            cache, neighbour, pieces = RowCache(), RowCache(), []
            for begin, end in ((0, 9), (9, CHECK_TOKENS - 1), (CHECK_TOKENS - 1, CHECK_TOKENS)):
                piece = text[begin:end].tolist()
                spans = [Span(neighbour, piece[:1], 0), Span(cache, piece, len(piece))]
                pieces.append(self.forward(spans)[1])
                cache = cache.fork() if begin == 0 else cache  # the rest sees the beginning as a shared one
        except Exception as exc:
            name = type(self.model).__name__
            raise ModelLoadError(f"{folder}: {name} does not run in the transformers engine ({exc})") from exc
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if cache.num_layers != num_layers:
            raise ModelLoadError(
                f"{folder}: {type(self.model).__name__} has {num_layers} layers, of which {cache.num_layers} use the "
                "attention that rows can be batched with; this architecture is not supported here"
            )
        self.kv_bytes_per_token = neighbour.num_bytes // neighbour.capacity
        difference = float((torch.cat(pieces) - plain).abs().max())
        if not difference <= TOLERANCE_NATS.get(self.model.dtype, LOW_PRECISION_TOLERANCE_NATS):
            raise ModelLoadError(
                f"{folder}: {type(self.model).__name__} gives log-probabilities that differ by {difference:.2g} nats "
                "from its own plain forward when rows are batched; this architecture is not supported here"
                if difference == difference
                else f"{folder}: the model's outputs are not finite; its weights are damaged or need another dtype"
            )

    def _assign(self, owners: Sequence[str | None], keep: Sequence[int]) -> None:
        """owners: an adapter or delta for each token of the next forward; keep: those that logits are wanted of."""
        if self._adapters is not None:
            self._adapters.assign(owners, self.model.dtype, self.device)
        if self._at_head is not None:
            self._at_head.assign([owners[place] for place in keep], self.model.dtype, self.device)

    def _plain(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The model's own forward on one text. -> (T, vocab_size) log-probabilities"""
        logits = self.model(input_ids=token_ids[None].to(self.device), use_cache=False).logits[0]
        return torch.log_softmax(logits[:, : self.vocab_size].float(), dim=-1)
