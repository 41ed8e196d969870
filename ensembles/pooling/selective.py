"""Selective averaging: the main member's distribution, but the pool's where the rule says so.

    entropy:   q = pool   where H(p_main) >= threshold                     H in nats, of the whole distribution
    disagree:  q = pool   where Σ_x |pool(x) - p_main(x)| / 2 >= threshold   the total variation distance
               q = p_main elsewhere

The main member is the one of the largest weight, the first of equals. Whatever was written, the pool is that over all
members with all that came before, so a posterior pool's weights are what they are where every token is pooled. A
threshold of 0 pools everywhere. The entropy rule looks at the main member alone: where it is sure the others need not
be asked at all, also where they would object. The distance is known once they have read, so it saves forwards only
where several tokens are read at once.

Reference: Yun, Ki, Lee & Yang, "When to Ensemble: Identifying Token-Level Points for Stable and Fast LLM Ensembling"
(SAFE), arXiv 2510.15346, 2025: members agree, and need no ensemble, at most tokens. There one model drafts, the others
verify by rules of consensus and tokenisation, and pooled distributions are sharpened; here the rules are the two above.
"""

from __future__ import annotations

import torch

from ensemble_server.ensembles.base import When
from ensemble_server.ensembles.pooling.disagreement import entropy, total_variation


def is_unsure(when: When, main: torch.Tensor) -> torch.Tensor:
    """Whether the others have to be asked, by what the main member expects. main: (..., V). -> (...) bool.

    Always true for a rule that only their answer decides.
    """
    if when.entropy is None:
        return torch.ones(main.shape[:-1], dtype=torch.bool, device=main.device)
    return entropy(main) >= when.entropy


def is_pooled(when: When, main: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Where tokens come from the pool. main, pooled: (..., V), normalised. -> (...) bool"""
    if when.disagree is None:
        return is_unsure(when, main)
    return total_variation(pooled, main) >= when.disagree


def selected(when: When, main: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """(..., V): what tokens come from."""
    return torch.where(is_pooled(when, main, pooled)[..., None], pooled, main)
