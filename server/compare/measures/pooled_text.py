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

    `logprobs`: what the mixture gave the tokens so far (nats).
    """

    def __init__(self, mixture: Mixture, place: Mapping[str, int]) -> None:
        self._mixture = mixture
        self._rows = [place[member] for member in mixture.weights]
        self._main = list(mixture.weights).index(mixture.main)
        self._prior = effective_weights(list(mixture.weights.values()))
        self._state = following.start(self._prior, mixture.share)
        self._logprobs: list[np.ndarray] = []

    @property
    def logprobs(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *self._logprobs])

    def take(self, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """As `MixtureHost.visit_logprobs` shows a text: logprobs (K, t, V), targets (t,)."""
        rows, mixture = logprobs[self._rows], self._mixture
        of_text = rows[0]
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
                of_text = selective.selected(mixture.when, rows[self._main], of_text)
        self._logprobs.append(of_text.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
