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
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.base import Mixture, PoolName
from ensemble_server.ensembles.pooling import effective_weights
from ensemble_server.ensembles.probability_averaging import AUTO, POOLS, mixture_of
from ensemble_server.server.config.problems import nearest

if TYPE_CHECKING:
    from ensemble_server.server.one_model.configuration import EnsembleConfig

WEIGHTS, POOL, SHARE = KEYS = ("ensemble_weights", "ensemble_pool", "ensemble_share")


@dataclass(frozen=True)
class RequestMixture:
    """`weights`: one per member of the directory, as `ensembles.pooling.effective_weights` gives them."""

    weights: tuple[float, ...]
    pool: PoolName
    share: float


@dataclass(frozen=True)
class Directory:
    """What requests to an exported directory are checked against: its members by name, and its own mixture."""

    members: tuple[str, ...]
    mixture: Mixture

    @classmethod
    def of(cls, config: EnsembleConfig) -> Directory:
        return cls(tuple(member["name"] for member in config.members), config.mixture)

    @property
    def keeps_evidence(self) -> bool:
        """Evidence takes room in the KV cache, so only directories whose own pool is posterior keep it."""
        return self.mixture.pool == "posterior" and len(self.members) > 1

    @property
    def default(self) -> RequestMixture:
        return self.of_request(None)

    def of_request(self, extra_args: Mapping[str, Any] | None) -> RequestMixture:
        """The mixture of a request. Raises `ValueError` that names the key."""
        return request_mixture(extra_args, self.mixture, self.members, keeps_evidence=self.keeps_evidence)


def request_mixture(
    extra_args: Mapping[str, Any] | None, default: Mixture, members: Sequence[str], *, keeps_evidence: bool
) -> RequestMixture:
    """The mixture of a request. `default` and `members` are the directory's.

    keeps_evidence: whether the directory keeps evidence for the posterior pool. Raises `ValueError` that names the key.
    """
    found = {key: value for key, value in (extra_args or {}).items() if key.startswith("ensemble")}
    for key in found:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{nearest(key, KEYS)}")
    pool = found.get(POOL, default.pool)
    if pool not in POOLS:
        raise ValueError(f"{POOL} must be one of {', '.join(POOLS)}, got {pool!r}")
    weights = found.get(WEIGHTS, [default.weights.get(member, 0.0) for member in members])
    if not isinstance(weights, Sequence) or isinstance(weights, str) or not all(map(_is_number, weights)):
        raise ValueError(f"{WEIGHTS} must be a list of numbers, got {weights!r}")
    if len(weights) != len(members):
        raise ValueError(
            f"{WEIGHTS} must have {len(members)} numbers, one per member ({', '.join(members)}), got {len(weights)}"
        )
    share = found.get(SHARE, default.share if pool == "posterior" else 0.0)
    if share == AUTO:
        raise ValueError(f"{SHARE}: auto is learnt by transformers alone; give vLLM a number from 0 to below 1")
    if not _is_number(share) or not 0 <= share < 1:
        raise ValueError(f"{SHARE} must be a number from 0 to below 1, got {share!r}")
    mixture = mixture_of(dict(zip(members, map(float, weights), strict=True)), pool, float(share))
    if len(mixture.weights) == 1 and pool != "geometric":
        pool = "arithmetic"  # one member: no evidence moves it
    if pool == "posterior":
        _check_evidence(found, mixture, default, keeps_evidence=keeps_evidence)
    share = float(share) if pool == "posterior" else 0.0
    return RequestMixture(tuple(effective_weights(list(map(float, weights))).tolist()), pool, share)


def _check_evidence(found: Mapping[str, Any], mixture: Mixture, default: Mixture, *, keeps_evidence: bool) -> None:
    """Weights that follow the evidence need what the KV cache holds of it: each member's likelihood of the text so far,
    which serves any prior, and for the directory's own share and prior the weights themselves.
    """
    if not keeps_evidence:
        raise ValueError(
            f"{POOL}: posterior needs evidence, which this directory does not keep; export it with `pool: posterior`, "
            "then its requests may choose any pool"
        )
    if mixture.share and (mixture.share != default.share or mixture.weights != default.weights):
        key = WEIGHTS if WEIGHTS in found and SHARE not in found else SHARE
        raise ValueError(
            f"{key}: with a share above 0 evidence is kept for the directory's own weights and share only "
            f"({dict(default.weights)}, {default.share:g}); leave both keys out, or send {SHARE} 0"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
