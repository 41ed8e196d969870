"""What a mixture gives the tokens of one text, from whole distributions: for those of which more has to be known than
what members gave the tokens that came (geometric pools, which are normalised, and selective averages)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import effective_weights, following, pool, selective

if TYPE_CHECKING:
    import torch


def needs_whole_rows(mixture: Mixture) -> bool:
    return mixture.pool == "geometric" or (mixture.when is not None and len(mixture.weights) > 1)


class PooledText:
    """`place`: the row of each member in what is shown to `take`, chunk after chunk of the text.

    `logprobs`, `is_joint`: of the tokens so far, what the mixture gave them (nats), and whether that is the pool's.
    """

    def __init__(self, mixture: Mixture, place: Mapping[str, int]) -> None:
        self._mixture = mixture
        self._rows = [place[member] for member in mixture.weights]
        self._main = list(mixture.weights).index(mixture.main)
        self._prior = effective_weights(list(mixture.weights.values()))
        self._state = following.start(self._prior, mixture.share)
        self._logprobs: list[np.ndarray] = []
        self._is_joint: list[np.ndarray] = []

    @property
    def logprobs(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *self._logprobs])

    @property
    def is_joint(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=bool), *self._is_joint])

    def take(self, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """As `MixtureHost.visit_logprobs` shows a text: logprobs (K, t, V), targets (t,)."""
        rows, mixture = logprobs[self._rows], self._mixture
        of_text = rows[0]
        is_joint = np.ones(len(targets), dtype=bool)
        if len(rows) > 1:
            weights = np.repeat(self._prior[:, None], len(targets), axis=1)
            if mixture.pool == "posterior":
                evidence = (
                    rows.gather(2, targets[None, :, None].expand(len(rows), -1, 1))[..., 0].double().cpu().numpy()
                )
                path, self._state = following.track(self._state, evidence, self._prior, mixture.share)
                weights = path[:, :-1]
            of_text = pool(mixture.pool, rows, rows.new_tensor(weights))
            if mixture.when is not None:
                joint = selective.is_pooled(mixture.when, rows[self._main], of_text)
                of_text = of_text.where(joint[:, None], rows[self._main])
                is_joint = joint.cpu().numpy()
        self._logprobs.append(of_text.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
        self._is_joint.append(is_joint)
