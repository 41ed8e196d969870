"""What every row of a forward carries besides hidden states: how its members are to be pooled.

vLLM asks for logits in several places (sampled tokens, drafted tokens, prompt log-probabilities) with rows of its own
choice and says nothing of the requests behind them. So a row's weights ride along as further columns of its hidden
state: (T, K + 2) float32, whose bits are put into as many columns of the hidden states' dtype as they need.

    weights  K      as `ensembles.pooling.effective_weights` gives them; for `BAYES` and `SHARED` the prior's
    kind     1      one of the four below
    slot     1      where the row's evidence is kept, if it is the last one of its request in this forward, else -1
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ensemble_server.ensembles.pooling import pool
from ensemble_server.server.one_model.vllm.request_mixture import RequestMixture

# The kinds: two pools with fixed weights; two whose weights follow the evidence, without and with a share.
ARITHMETIC, GEOMETRIC, BAYES, SHARED = 0, 1, 2, 3
NUM_EXTRA = 2


def kind_of(mixture: RequestMixture) -> int:
    if mixture.pool == "posterior":
        return SHARED if mixture.share else BAYES
    return GEOMETRIC if mixture.pool == "geometric" else ARITHMETIC


def columns_of(mixture: RequestMixture) -> tuple[float, ...]:
    """The K + 2 columns of a request's rows, before the evidence is looked at."""
    return (*mixture.weights, float(kind_of(mixture)), -1.0)


def packed(hidden: Sequence[torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, H_k) of each member and columns (T, K + 2) float32 side by side, in the former's dtype."""
    return torch.cat([*hidden, columns.contiguous().view(hidden[0].dtype)], dim=-1)


def unpacked(rows: torch.Tensor, widths: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What `packed` was given; `widths` are the H_k."""
    *hidden, columns = rows.split([*widths, rows.shape[-1] - sum(widths)], dim=-1)
    return [part.contiguous() for part in hidden], columns.contiguous().view(torch.float32)


def mix(logprobs: Sequence[torch.Tensor], columns: torch.Tensor, kinds: Collection[int]) -> torch.Tensor:
    """The pooled log-probabilities (N, V), row by row.

    logprobs: of each member (N, V) float32, normalised. columns: (N, K + 2). kinds: all that occur in `columns`; known
    without asking the device, so that nothing waits for it.
    """
    weights = columns[:, :-NUM_EXTRA].T
    if GEOMETRIC not in kinds:
        return pool("arithmetic", logprobs, weights)
    geometric = pool("geometric", logprobs, weights)
    if all(kind == GEOMETRIC for kind in kinds):
        return geometric
    is_geometric = columns[:, -NUM_EXTRA, None] == GEOMETRIC
    return torch.where(is_geometric, geometric, pool("arithmetic", logprobs, weights))
