"""What a mixture over members of different vocabularies gives each byte of a text that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import DistributionModel, Message, Model
from ensemble_server.ensembles.pooling import effective_weights, following, pool

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ByteScores:
    """Of the last T bytes of a text: all but the first few that not every member can expect.

    `logprobs`: (T,) nats under the pool; `is_likeliest`: (T,) of bool, whether no other byte was more likely;
    `of_members`, `weights`: (K, T), each member's own nats and its weight in the pool.
    """

    logprobs: np.ndarray
    is_likeliest: np.ndarray
    of_members: np.ndarray
    weights: np.ndarray


def is_over_bytes(model: Model) -> bool:
    """Whether the members of a model have different vocabularies and are averaged over text."""
    return isinstance(model, DistributionModel) and model.host.averages_over(model.mixture) == "bytes"


async def score_bytes(
    model: DistributionModel, text: str, *, after: Sequence[Message] | None = None, priority: int = 1
) -> ByteScores:
    """`after`: a conversation that each member reads first, in its own rendering.

    Raises what `MixtureHost.visit_bytes` does.
    """
    import torch

    mixture, members = model.mixture, list(model.mixture.weights)
    prior = effective_weights(list(mixture.weights.values()))
    found = [ByteScores(np.zeros(0), np.zeros(0, dtype=bool), np.zeros((len(prior), 0)), np.zeros((len(prior), 0)))]

    def visit(rows: torch.Tensor, targets: torch.Tensor) -> None:
        of_members = rows.gather(2, targets[None, :, None].expand(len(rows), -1, 1))[..., 0].numpy()
        weights = np.repeat(prior[:, None], len(targets), axis=1)
        if mixture.pool == "posterior" and len(prior) > 1:
            start = following.start(prior, mixture.share)
            weights = following.track(start, of_members, prior, mixture.share)[0][:, :-1]
        pooled = pool(mixture.pool, rows, torch.from_numpy(weights)) if len(prior) > 1 else rows[0]
        logprobs = pooled.gather(1, targets[:, None])[:, 0]
        found.append(
            ByteScores(logprobs.numpy(), (logprobs >= pooled.amax(-1)).numpy(), of_members.copy(), np.array(weights))
        )

    await model.host.visit_bytes(members, text, visit, after=after, priority=priority)
    return found[-1]
