"""Pooling: many next-token distributions become one. Pure tensor maths on log-probabilities in float32.

Every pool takes `logprobs: (n_members, n_rows, vocab_size)`, one tensor or one per member, normalised over the last
axis, and `weights: (n_members, n_rows)`, and returns `(n_rows, vocab_size)`, normalised again. Inputs are not changed.
The posterior pool is the arithmetic one with weights that `posterior.track` moves from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.pooling import arithmetic, geometric

if TYPE_CHECKING:
    import torch

    from ensemble_server.ensembles.base import PoolName


def pool(
    name: PoolName,
    logprobs: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """The pooled log-probabilities (n_rows, vocab_size); see the module's docstring.

    `known`: (n_members, n_rows, vocab_size) bool, the tokens that each member has, where some lack tokens of others: a
    member's log-probability of a token that it lacks is -inf.
    """
    if name == "geometric":
        return geometric.pool(logprobs, weights, known)
    return arithmetic.pool(logprobs, weights)


def effective_weights(weights: Sequence[float]) -> np.ndarray:
    """(K,) float64: scaled to sum to one, or as written if one is negative (only the geometric pool takes those)."""
    array = np.asarray(weights, dtype=np.float64)
    if (array < 0).any():
        return array
    array = array / array.max()  # the sum of large ones could overflow
    return array / array.sum()
