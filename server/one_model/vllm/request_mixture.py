"""What one request says about its mixture: `extra_args` of vLLM's sampling parameters, `vllm_xargs` over HTTP.

    ensemble_weights   one number per member, in the order of the directory's config.json; [0, 1, 0] is the second alone
    ensemble_pool      arithmetic | geometric | posterior
    ensemble_share     posterior only: the part of the weights that returns to the prior at each token

A key left out keeps the directory's value. Other keys that begin with `ensemble` are refused; the rest are not ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ensembles.base import Mixture, PoolName
from ensembles.pooling import effective_weights
from ensembles.probability_averaging import POOLS, mixture_of
from server.findings import nearest

WEIGHTS, POOL, SHARE = KEYS = ("ensemble_weights", "ensemble_pool", "ensemble_share")


@dataclass(frozen=True)
class RequestMixture:
    """`weights`: one per member of the directory, as `ensembles.pooling.effective_weights` gives them."""

    weights: tuple[float, ...]
    pool: PoolName
    share: float


def request_mixture(
    extra_args: Mapping[str, Any] | None, default: Mixture, members: Sequence[str], *, keeps_evidence: bool
) -> RequestMixture:
    """The mixture of a request. `default` and `members` are the directory's.

    keeps_evidence: whether the directory's default pool is posterior, so that there is room for evidence.
    Raises `ValueError` that names the key.
    """
    found = {key: value for key, value in (extra_args or {}).items() if key.startswith("ensemble")}
    for key in found:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{nearest(key, KEYS)}")
    pool = found.get(POOL, default.pool)
    if pool not in POOLS:
        raise ValueError(f"{POOL} must be one of {', '.join(POOLS)}, got {pool!r}")
    if pool == "posterior" and not keeps_evidence:
        raise ValueError(
            f"{POOL}: posterior needs room for evidence, which this directory does not keep; "
            "export it with `pool: posterior`, then a request may choose any pool"
        )
    share = found.get(SHARE, default.share if pool == "posterior" else 0.0)
    if not _is_number(share) or not 0 <= share < 1:
        raise ValueError(f"{SHARE} must be a number from 0 to below 1, got {share!r}")
    weights = found.get(WEIGHTS, [default.weights.get(member, 0.0) for member in members])
    if not isinstance(weights, Sequence) or isinstance(weights, str) or not all(map(_is_number, weights)):
        raise ValueError(f"{WEIGHTS} must be a list of numbers, got {weights!r}")
    if len(weights) != len(members):
        raise ValueError(
            f"{WEIGHTS} must have {len(members)} numbers, one per member ({', '.join(members)}), got {len(weights)}"
        )
    mixture_of(dict(zip(members, map(float, weights), strict=True)), pool, float(share))
    return RequestMixture(tuple(effective_weights(weights).tolist()), pool, float(share))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
