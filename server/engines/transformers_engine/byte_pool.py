"""The pool of members that write by bytes, at one place of a text: their weights there, and what follows from the next
byte. Never changed, so that ways to go on from a place share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import following, pool
from ensemble_server.ensembles.spelling import ROW


@dataclass(frozen=True)
class BytePool:
    """`state`: what the weights follow from (`ensembles.pooling.following`); `prior`: (K,)."""

    mixture: Mixture
    prior: np.ndarray
    state: np.ndarray

    @cached_property
    def weights(self) -> np.ndarray:
        """(K,)"""
        return following.member_weights(self.state, self.mixture.share)

    @property
    def spreads(self) -> bool:
        """Which rows it wants; see `Lattice.row`."""
        return self.mixture.pool == "geometric"

    def pooled(self, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
        """rows: K of (257,) -> (257,) float64, and the weights (K,) that were used: zero for members that cannot write
        the text, whose rows are all -inf."""
        is_lost = np.array([row.max() == -math.inf for row in rows])
        weights = np.where(is_lost, 0.0, self.weights)
        if not (weights > 0).any():
            return torch.full((ROW,), -math.log(ROW), dtype=torch.float64), weights
        if len(rows) == 1:
            return torch.from_numpy(rows[0]), weights
        stacked = torch.from_numpy(np.stack(rows))[:, None]
        return pool(self.mixture.pool, stacked, torch.from_numpy(weights)[:, None])[0], weights

    def after(self, evidence: Sequence[float]) -> BytePool:
        """The pool behind a byte that member k gave `evidence[k]` nats."""
        if self.mixture.pool != "posterior" or len(evidence) == 1:
            return self
        return replace(self, state=following.update(self.state, evidence, self.prior, self.mixture.share))
