"""What a client may want to know about one token, out of whole distributions; each member's view, too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import MemberToken, TokenLogprob
from ensemble_server.ensembles.pooling.disagreement import entropy, jensen_shannon
from ensemble_server.server.engines.shared.token_report import report
from ensemble_server.server.weights.view import Surface


def describe(
    surface: Surface, logprobs: torch.Tensor, token_id: int, num_top: int, *, previous: int | None = None
) -> TokenLogprob:
    """One token under `logprobs` (V,). If likely enough it is among `top` too, with the very same number."""
    values, ids = logprobs.topk(min(num_top, len(logprobs))) if num_top else (logprobs[:0], logprobs[:0])
    alternatives = zip(ids.tolist(), values.tolist(), strict=True)
    return report(surface, token_id, float(logprobs[token_id]), alternatives, previous=previous)


def explained(
    token: TokenLogprob,
    pooled: torch.Tensor,
    member_names: Sequence[str],
    member_logprobs: Sequence[torch.Tensor],
    weights: np.ndarray,
    tops: Sequence[tuple[TokenLogprob, ...]],
) -> TokenLogprob:
    """`token` with each member's view. pooled: (V,); member_logprobs: per member (V,); weights: (K,) as they were;
    tops: per member its own most likely tokens."""
    members = {
        name: MemberToken(float(row[token.token_id]), float(weight), top)
        for name, row, weight, top in zip(member_names, member_logprobs, weights, tops, strict=True)
    }
    stacked = torch.stack([row.to(pooled.device) for row in member_logprobs])
    spread = jensen_shannon(stacked, torch.as_tensor(weights, dtype=torch.float32, device=pooled.device))
    return TokenLogprob(
        token.token_id, token.text, token.bytes, token.logprob, token.top, members, float(entropy(pooled)), spread
    )
