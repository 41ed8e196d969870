"""Weights fitted to one half of development text and judged on the other, so that what they gain is not an illusion.

Documents alternate: the first of each file is fitted to, the second held back, and so on. Context crosses from one half
to the other where the text is continuous, for the fitted pool and for the one that it is compared with alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.comparison.paired import Comparison, compare_bits_per_byte
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.probability_averaging import mixture_of
from ensemble_server.server.compare.deciding.fitting import FittedWeights, ReadingSettings, WeightFit
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.text_measure import (
    TextScores,
    by_document,
    mixture_logprobs,
    score_mixtures,
    scored_part,
)
from ensemble_server.server.compare.planning.held_out import shared_sequences
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from ensemble_server.ensembles.fitting.log_linear import Constraint
    from ensemble_server.server.hosting import Hosting


@dataclass(frozen=True)
class JudgedFit:
    """Fitted weights and what they are worth on the documents held back.

    `before`, `after`: the pool as configured, and as fitted; `alone`: each member of the pool; `difference`: after less
    before, in bits per byte, paired by document. `num_fitted`, `num_held_back` count documents.
    `share_seen`: of the sequences of 13 words held back, those that stand in what was fitted to as well.
    """

    fitted: FittedWeights
    before: TextScores
    after: TextScores
    alone: Mapping[str, TextScores]
    difference: Comparison
    num_fitted: int
    num_held_back: int
    share_seen: float


async def fit_and_judge(
    hosting: Hosting,
    model_name: str,
    texts: Sequence[Documents],
    *,
    constraint: Constraint = "simplex",
    **reading: Unpack[ReadingSettings],
) -> JudgedFit:
    """`seed`: of the interval, too. Raises `ConfigError` if the model cannot be fitted, or if there is no document to
    hold back.

    Members read the texts once; for a geometric pool twice, as only then its new weights are known.
    """
    is_fitted = [np.arange(len(documents)) % 2 == 0 for documents in texts]
    num_held_back = sum(int((~halves).sum()) for halves in is_fitted)
    if not num_held_back:
        raise ConfigError(
            "there are too few documents to hold one back from each file; give more text, or cut it into shorter ones"
        )
    fit = await WeightFit.read(hosting, model_name, texts, counted=is_fitted, **reading)
    fitted = await in_own_thread(fit.solve, constraint)
    mixture = fit.model.mixture
    pools = {
        "before": replace(mixture, when=None),  # what is fitted is the average at every token
        "after": mixture_of(fitted.weights, mixture.pool, fitted.share or 0.0),
    }
    scores = await _scores(fit, texts, pools)
    held_back = {
        name: joined([only(found, ~half) for found, half in zip(of_texts, is_fitted, strict=True)])
        for name, of_texts in scores.items()
    }
    before, after = held_back["before"], held_back["after"]
    return JudgedFit(
        fitted,
        before,
        after,
        {member: held_back[f"alone: {member}"] for member in fit.model.members},
        compare_bits_per_byte(
            after.nats,
            after.num_bytes,
            before.nats,
            before.num_bytes,
            are_neighbours=all(documents.is_continuous for documents in texts),
            seed=reading.get("seed", 0),
        ),
        sum(int(half.sum()) for half in is_fitted),
        num_held_back,
        shared_sequences(chosen_texts(texts, is_fitted, False), chosen_texts(texts, is_fitted, True)),
    )


async def _scores(
    fit: WeightFit, texts: Sequence[Documents], pools: Mapping[str, Mixture]
) -> dict[str, list[TextScores]]:
    """Of the pools, and of each member alone, for each text; from what the members gave, where that is enough."""
    members = fit.model.members
    mixtures = {**pools, **{f"alone: {member}": Mixture({member: 1.0}) for member in members}}
    scores: dict[str, list[TextScores]] = {name: [] for name in mixtures}
    for documents, reading in zip(texts, fit.readings, strict=True):
        for name, mixture in mixtures.items():
            if mixture.pool == "geometric":
                continue
            rows = [members.index(member) for member in mixture.weights]
            parts = [
                scored_part(window, mixture_logprobs(mixture, logprobs[rows]))
                for window, logprobs in zip(reading.windows, reading.logprobs, strict=True)
            ]
            scores[name].append(by_document(reading.windows, parts, len(documents)))
        geometric = {name: mixture for name, mixture in mixtures.items() if mixture.pool == "geometric"}
        if geometric:
            found = await score_mixtures(fit.model.host, geometric, reading.windows, len(documents))
            for name, of_text in found.items():
                scores[name].append(of_text)
    return scores


def chosen_texts(texts: Sequence[Documents], is_fitted: Sequence[np.ndarray], wanted: bool) -> Iterator[str]:
    for documents, halves in zip(texts, is_fitted, strict=True):
        yield from (text for text, is_first in zip(documents.texts, halves, strict=True) if is_first == wanted)


def only(scores: TextScores, chosen: np.ndarray) -> TextScores:
    return TextScores(scores.nats[chosen], scores.num_bytes[chosen], scores.num_tokens[chosen])


def joined(parts: Sequence[TextScores]) -> TextScores:
    return TextScores(
        np.concatenate([part.nats for part in parts]),
        np.concatenate([part.num_bytes for part in parts]),
        np.concatenate([part.num_tokens for part in parts]),
    )
