"""Windows as a student learns them: tokens, and the fused target beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.distill.loss import Batch
from ensemble_server.server.distill.records import Records, WindowRecord
from ensemble_server.server.distill.targets import (
    FusedTarget,
    Weights,
    avg_ce_weights,
    cross_entropies,
    fused,
    min_ce_weights,
    pool_weights,
)


@dataclass(frozen=True)
class Lessons:
    """`weights`: of the rows of each window's record at each of its tokens; None: there is no target, only text.

    `only_top`: see `targets.fused`.
    """

    windows: Sequence[Window]
    records: Records | None = None
    weights: Sequence[Weights] | None = None
    only_top: int | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: Sequence[int]) -> Batch:
        windows = [self.windows[index] for index in indices]
        length = max(len(window.token_ids) for window in windows)
        ids = torch.zeros((len(windows), length), dtype=torch.long)
        is_scored = torch.zeros((len(windows), length - 1), dtype=torch.bool)
        for row, window in enumerate(windows):
            ids[row, : len(window.token_ids)] = torch.tensor(window.token_ids)
            is_scored[row, window.first_scored - 1 : window.num_read] = True
        if self.records is None or self.weights is None:
            return Batch(ids, ids[:, 1:], is_scored)
        targets = [fused(self.records[i], self.weights[i], only_top=self.only_top) for i in indices]
        return Batch(ids, ids[:, 1:], is_scored, *_side_by_side(targets, length - 1))


def lessons_of(
    wanted: Distillation, mixture: Mixture, windows: Sequence[Window], records: Records, *, is_test: bool = False
) -> Lessons:
    """What `wanted` asks the student to learn from these windows. `is_test`: what the ensemble itself says of them."""
    of_tokens = [record.of_tokens for record in records]
    only_top = None if wanted.tail or is_test else wanted.top_k
    if wanted.target == "mixture" or is_test:
        weights = [_pool_weights(mixture, record) for record in records]
        return Lessons(windows, records, weights, only_top)
    weigh = min_ce_weights if wanted.target == "min_ce" else avg_ce_weights
    num_members = len(mixture.weights)
    entropies = cross_entropies(of_tokens, [window.documents for window in windows], wanted.level)
    weights = [_only_members(weigh(nats[:num_members]), len(nats)) for nats in entropies]
    return Lessons(windows, records, weights, only_top)


def _pool_weights(mixture: Mixture, record: WindowRecord) -> Weights:
    """Where members have other vocabularies a pool's weights move at every byte; those at a token's first one count."""
    if not record.is_over_bytes:
        return pool_weights(mixture, record.of_tokens)
    begins = np.cumsum(record.num_bytes) - record.num_bytes
    return pool_weights(mixture, np.nan_to_num(record.of_bytes))[:, np.minimum(begins, record.of_bytes.shape[1] - 1)]


def _only_members(weights: Weights, num_rows: int) -> Weights:
    return np.pad(weights, ((0, num_rows - len(weights)), (0, 0)))


def _side_by_side(targets: Sequence[FusedTarget], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, probs (B, length, M) and tail (B, length), filled up with probability 0."""
    width = max(target.ids.shape[1] for target in targets)
    ids = np.zeros((len(targets), length, width), dtype=np.int64)
    probs = np.zeros(ids.shape, dtype=np.float32)
    tail = np.zeros(ids.shape[:2], dtype=np.float32)
    for row, target in enumerate(targets):
        num_tokens, used = target.ids.shape
        ids[row, :num_tokens] = target.ids[:, :1]  # a token that is there already counts once
        ids[row, :num_tokens, :used] = target.ids
        probs[row, :num_tokens, :used] = target.probs
        tail[row, :num_tokens] = target.tail
    return torch.from_numpy(ids), torch.from_numpy(probs), torch.from_numpy(tail)
