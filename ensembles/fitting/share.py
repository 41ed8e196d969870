"""The share of the posterior pool that makes texts most likely, from a grid.

The likelihood is not concave in the share, but smooth and one-dimensional: a grid over its useful range finds it to
the precision that matters. Weights start from the prior in each text; what they learn there is not fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.pooling import following
from ensemble_server.ensembles.pooling.following import Share

GRID = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class ShareFit:
    """`nats_per_token`: of each share of `grid`, in its order; the first of equal ones is the `share`."""

    share: float
    grid: tuple[float, ...]
    nats_per_token: tuple[float, ...]


def fit_share(
    texts: Sequence[np.ndarray],
    prior: np.ndarray,
    *,
    counted: Sequence[np.ndarray] | None = None,
    grid: Sequence[float] = GRID,
) -> ShareFit:
    """texts: (K, T) each, nats that the members gave the tokens of one text; prior: (K,), sums to one.

    `counted`: (T,) of bool for each text: whose tokens' likelihood is judged. The others are read all the same: the
    weights follow them, as they will when the pool serves.
    """
    if counted is None:
        counted = [np.ones(text.shape[1], dtype=bool) for text in texts]
    num_tokens = sum(int(mask.sum()) for mask in counted)
    if not num_tokens:
        raise ValueError("there is no token to fit the share to")
    nats = []
    for share in grid:
        total = sum(
            float(posterior_logprobs(text, prior, share)[mask].sum()) for text, mask in zip(texts, counted, strict=True)
        )
        nats.append(-total / num_tokens)
    return ShareFit(float(grid[int(np.argmin(nats))]), tuple(grid), tuple(nats))


def posterior_logprobs(token_logprobs: np.ndarray, prior: np.ndarray, share: Share) -> np.ndarray:
    """What the posterior pool gave the tokens of one text: (K, T) nats of its members -> (T,) nats."""
    weights = following.track(following.start(prior, share), token_logprobs, prior, share)[0][:, :-1]
    with np.errstate(divide="ignore"):  # log 0 is -inf, as it should be
        return np.logaddexp.reduce(np.log(weights) + token_logprobs, axis=0)
