"""What a mixture gives the tokens of one text, from whole distributions: for those of which more has to be known than
what members gave the tokens that came (geometric pools, which are normalised, selective averages, and gated ones)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import effective_weights, following, gated, pool, selective

if TYPE_CHECKING:
    import torch


def needs_whole_rows(mixture: Mixture) -> bool:
    is_moved = mixture.when is not None or mixture.gate is not None
    return mixture.pool == "geometric" or (is_moved and len(mixture.weights) > 1)


class PooledText:
    """`place`: the row of each member in what is shown to `take`, chunk after chunk of the text.

    `logprobs`: what the mixture gave the tokens so far (nats); `weights`: (K, T), of its members at each of them.
    """

    def __init__(self, mixture: Mixture, place: Mapping[str, int]) -> None:
        self._mixture = mixture
        self._rows = [place[member] for member in mixture.weights]
        self._main = list(mixture.weights).index(mixture.main)
        self._prior = effective_weights(list(mixture.weights.values()))
        self._state = following.start(self._prior, mixture.share)
        self._trail = gated.start(len(self._prior))
        self._logprobs: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    @property
    def logprobs(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *self._logprobs])

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([np.zeros((len(self._prior), 0)), *self._weights], axis=1)

    def take(self, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """As `MixtureHost.visit_logprobs` shows a text: logprobs (K, t, V), targets (t,)."""
        rows, mixture = logprobs[self._rows], self._mixture
        of_text = rows[0]
        weights = np.repeat(self._prior[:, None], len(targets), axis=1)
        if len(rows) > 1:
            if mixture.pool == "posterior":
                evidence = (
                    rows.gather(2, targets[None, :, None].expand(len(rows), -1, 1))[..., 0].double().cpu().numpy()
                )
                path, self._state = following.track(self._state, evidence, self._prior, mixture.share)
                weights = path[:, :-1]
                if mixture.gate is not None:
                    recent, places, self._trail = gated.follow(self._trail, evidence)
                    seen = gated.Situation(gated.views(rows), weights, recent, places)
                    weights = gated.weights(mixture.gate, seen)
            of_text = pool(mixture.pool, rows, rows.new_tensor(weights))
            if mixture.when is not None:
                of_text = selective.selected(mixture.when, rows[self._main], of_text)
        self._weights.append(weights)
        self._logprobs.append(of_text.gather(1, targets[:, None])[:, 0].double().cpu().numpy())
