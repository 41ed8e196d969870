"""How sure a distribution is (nats), and how far several are apart."""

from __future__ import annotations

import torch


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Shannon entropy over the last axis. logprobs: (..., V), normalised. -> (...)"""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def total_variation(logprobs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Σ |p - q| / 2 over the last axis, from 0 (the same) to 1: of so much probability the two dispose differently.

    Both (..., V), normalised. -> (...)
    """
    return (logprobs.exp() - others.exp()).abs().sum(-1) / 2


def jensen_shannon(logprobs: torch.Tensor, weights: torch.Tensor) -> float:
    """Generalised Jensen-Shannon divergence H(Σ w_k p_k) - Σ w_k H(p_k), from 0 (all agree) to ln K.

    logprobs: (K, V), normalised; weights: (K,), used by magnitude and scaled to sum to one.
    Reference: Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    weights = weights.abs() / weights.abs().sum()
    mixture = torch.logsumexp(logprobs + weights.log()[:, None], dim=0)
    return max(0.0, float(entropy(mixture) - (weights * entropy(logprobs)).sum()))
