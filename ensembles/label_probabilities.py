"""Probabilities of labels from what a model gives them as continuations of a prompt: zero-shot classification.

    s_l = sum over tokens t of label l of  log p(t | prompt, the tokens before)
    p_l = softmax over labels of  s_l / length_l  -  log prior_l

The sum favours short labels; dividing by a label's tokens or bytes (`Normalisation`) takes that away, and with it the
meaning of a probability under the model. `prior`: what the same model gives the labels when there is nothing to judge
(a content-free prompt); dividing by it takes away the model's liking for a label as such.

References: Brown et al., 2020, https://arxiv.org/abs/2005.14165 (scoring by length); Zhao et al., "Calibrate before
use", 2021, https://arxiv.org/abs/2102.09690, and Holtzman et al., "Surface form competition", 2021,
https://arxiv.org/abs/2104.08315 (priors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Normalisation = Literal["sum", "tokens", "bytes"]
LabelPool = Literal["arithmetic", "geometric", "ranks"]

MIN_LOG_PRIOR = -50.0  # nats; a label that a model never gives would otherwise win by being divided by nothing


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """[[1, 2, 3], [1, 2, 4, 5]] -> 2"""
    shortest = min(map(len, sequences))
    return next(
        (at for at in range(shortest) if any(ids[at] != sequences[0][at] for ids in sequences)),
        shortest,
    )


def label_probabilities(
    logprobs: Mapping[str, float], *, lengths: Mapping[str, int] | None = None, prior: Mapping[str, float] | None = None
) -> dict[str, float]:
    """{"yes": -1.0, "no": -2.0} -> {"yes": 0.731, "no": 0.269}; sums to one.

    `logprobs`: nats; minus infinity for a label that cannot be. `lengths`: of the labels, none for sums. `prior`:
    probabilities over the same labels. If no label can be, all are alike.
    """
    scores = np.array([logprobs[label] / (lengths[label] if lengths else 1) for label in logprobs])
    if prior is not None:
        with np.errstate(divide="ignore"):
            scores -= np.maximum(np.log([prior[label] for label in logprobs]), MIN_LOG_PRIOR)
    best = scores.max()
    powers = np.exp(scores - best) if np.isfinite(best) else np.ones(len(scores))
    return dict(zip(logprobs, (powers / powers.sum()).tolist(), strict=True))


def averaged(members: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """The weighted mean of the members' probabilities: the linear opinion pool over labels. Sums to one.

    `members`: at least one, all over the same labels. `weights`: none negative, one above zero.
    """
    total = sum(weights[name] for name in members)
    labels = next(iter(members.values()))
    return {label: sum(weights[name] * given[label] for name, given in members.items()) / total for label in labels}


def geometric(members: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """The weighted geometric mean of the members' probabilities, made to sum to one: the log-linear pool over labels.

    As `averaged`. A label that a member of weight above zero rules out is out; if that leaves none, all are alike.
    """
    total = sum(weights[name] for name in members)
    labels = next(iter(members.values()))
    logprobs = {
        label: sum(
            weights[name] / total * (math.log(given[label]) if given[label] > 0 else -math.inf)
            for name, given in members.items()
            if weights[name] > 0
        )
        for label in labels
    }
    return label_probabilities(logprobs)


def as_ranks(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """A member's probabilities for many rows, each replaced by its rank among those of the same label.

    [{"a": .1, "b": .9}, {"a": .4, "b": .6}] -> [{"a": 1/3, "b": 2/3}, {"a": 2/3, "b": 1/3}]: the rank from 1, equal
    ones at their mean, divided by the number of rows + 1. Members that are sure in different degrees become
    comparable, which suits measures of order (AUC); what is lost is how sure they were.
    """
    ranked = [dict[str, float]() for _ in rows]
    for label in rows[0]:
        values = np.array([row[label] for row in rows])
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place] / (len(rows) + 1)
        for row, rank in zip(ranked, ranks, strict=True):
            row[label] = float(rank)
    return ranked


def likeliest(probabilities: Mapping[str, float]) -> str:
    """Of equal ones the first."""
    return max(probabilities, key=probabilities.__getitem__)
