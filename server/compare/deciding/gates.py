"""A gate trained on one half of development text and judged on the other, beside the pools that it has to beat.

Documents alternate as in `held_back`: the first of each file is trained on, the second held back, and so on. Those that
are trained on are dealt with the seed into folds, for the cross-validation that says how much is to be learnt; what is
held back is not looked at before the end. The share of the posterior pool is fitted first, to all that is trained on,
so that the gate is compared with the best such pool and not with one that nobody tuned. The gate may stand on another
share: a pool with none is soon sure of one member, and what is sure of itself cannot be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.comparison.paired import Comparison, compare_bits_per_byte
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.fitting.gate import NOT_TRAINED, GateFit, GateText, fit_gate, gated_logprobs
from ensemble_server.ensembles.fitting.share import fit_share
from ensemble_server.ensembles.pooling import effective_weights
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.compare.deciding.fitting import WeightFit, check_fittable
from ensemble_server.server.compare.deciding.held_back import chosen_texts, joined, only
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.text_measure import (
    TextScores,
    by_document,
    mixture_logprobs,
    scored_part,
)
from ensemble_server.server.compare.measures.windows import TextWindow, Window
from ensemble_server.server.compare.planning.held_out import shared_sequences
from ensemble_server.server.config.gates import identity
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

NUM_FOLDS = 5
SHARES = (0.01, 0.05)  # under a gate, besides the fitted one


@dataclass(frozen=True)
class JudgedGate:
    """A gate and what it is worth on the documents held back. `share`: the fitted one of the pool without a gate;
    `share_under_gate`: of the pool that the gate stands on.

    `scores`: of the `uniform` average, the `configured` posterior pool, the `posterior` one with the fitted share, and
    of `gate`; `alone`: of each member. `against`: gate less each of the other three, in bits per byte, paired by
    document. `num_fitted`, `num_held_back` count documents; `share_seen` as in `held_back.JudgedFit`.
    """

    fit: GateFit
    share: float
    share_under_gate: float
    scores: Mapping[str, TextScores]
    alone: Mapping[str, TextScores]
    against: Mapping[str, Comparison]
    num_fitted: int
    num_held_back: int
    share_seen: float


async def fit_and_judge_gate(
    hosting: Hosting,
    model_name: str,
    texts: Sequence[Documents],
    *,
    window: int,
    stride: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> JudgedGate:
    """`seed`: of the folds, and of the intervals. The members read the texts once.

    Raises `ConfigError` if the model is no posterior pool over tokens, or there are too few documents.
    """
    is_trained = [np.arange(len(documents)) % 2 == 0 for documents in texts]
    num_fitted = sum(int(half.sum()) for half in is_trained)
    num_held_back = sum(len(half) for half in is_trained) - num_fitted
    if num_fitted < 2 or not num_held_back:
        raise ConfigError(
            f"{num_fitted + num_held_back} documents are too few: two are needed to train on, and one to hold back; "
            "give more text, or cut it into shorter ones"
        )
    check_fittable(hosting.config, model_name)
    model = hosting.models[model_name]
    assert isinstance(model, ProbabilityAverage), "as its config says"
    mixture = model.mixture
    is_over_tokens = model.host.averages_over(mixture) == "tokens"
    if mixture.pool != "posterior" or len(mixture.weights) < 2 or not is_over_tokens:
        raise ConfigError(
            f"model {model_name!r}: a gate moves the weights of a posterior pool over tokens, of two members or more; "
            "give it `pool: posterior`, and members of one vocabulary"
        )
    read = await WeightFit.read(
        hosting,
        model_name,
        texts,
        window=window,
        stride=stride,
        counted=is_trained,
        keeps_views=True,
        on_progress=on_progress,
    )
    rows = [read.model.members.index(member) for member in mixture.weights]
    prior = effective_weights(list(mixture.weights.values()))
    windows = [(piece, owner) for owner, reading in enumerate(read.readings) for piece in reading.windows]
    logprobs = [part[rows] for reading in read.readings for part in reading.logprobs]
    views = [part for reading in read.readings for part in reading.views]
    masks = [mask for reading in read.readings for mask in reading.is_counted]
    folds_of = _dealt(is_trained, seed)
    folds = [_of_tokens(piece, folds_of[owner], mask) for (piece, owner), mask in zip(windows, masks, strict=True)]
    names = list(mixture.weights)
    folder = hosting.config.source.parent
    identities = [(name, identity(hosting.config.models, name, folder)) for name in names]

    def solve() -> tuple[float, float, GateFit]:
        share = fit_share(logprobs, prior, counted=masks).share
        training = [GateText(*parts) for parts in zip(logprobs, views, folds, strict=True)]
        fits = {under: fit_gate(training, prior, under, identities) for under in (share, *SHARES)}
        best = min(fits, key=lambda under: fits[under].nats)  # the first of equals
        return share, best, fits[best]

    try:
        share, share_under_gate, fit = await in_own_thread(solve)
    except ValueError as exc:
        raise ConfigError(f"{exc}; give more text, or cut it into shorter documents") from exc

    def scored(of_window: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> TextScores:
        """On what is held back. of_window: from what members gave the tokens, and the views, to what a pool gave."""
        found = [
            scored_part(piece, of_window(*parts)) for (piece, _), *parts in zip(windows, logprobs, views, strict=True)
        ]
        held_back = []
        for owner, documents in enumerate(texts):
            own = [n for n, (_, of) in enumerate(windows) if of == owner]
            scores = by_document([windows[n][0] for n in own], [found[n] for n in own], len(documents))
            held_back.append(only(scores, ~is_trained[owner]))
        return joined(held_back)

    def plain(pool: Mixture) -> TextScores:
        places = [names.index(name) for name in pool.weights]
        return scored(lambda nats, _: mixture_logprobs(pool, nats[places]))

    fitted = Mixture(mixture.weights, "posterior", share)
    scores = {
        "uniform": plain(Mixture(dict.fromkeys(names, 1.0))),
        "configured": plain(Mixture(mixture.weights, "posterior", mixture.share)),
        "posterior": plain(fitted),
        "gate": scored(lambda nats, seen: gated_logprobs(fit.gate, nats, seen, prior, share_under_gate)),
    }
    gate = scores["gate"]
    against = {
        name: compare_bits_per_byte(
            gate.nats,
            gate.num_bytes,
            other.nats,
            other.num_bytes,
            are_neighbours=all(documents.is_continuous for documents in texts),
            seed=seed,
        )
        for name, other in scores.items()
        if name != "gate"
    }
    share_seen = shared_sequences(chosen_texts(texts, is_trained, False), chosen_texts(texts, is_trained, True))
    alone = {name: plain(Mixture({name: 1.0})) for name in names}
    return JudgedGate(fit, share, share_under_gate, scores, alone, against, num_fitted, num_held_back, share_seen)


def _dealt(is_trained: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The fold of each document, `NOT_TRAINED` for those held back: for each text (num_documents,)."""
    places = [(owner, place) for owner, half in enumerate(is_trained) for place in np.flatnonzero(half)]
    folds = [np.full(len(half), NOT_TRAINED) for half in is_trained]
    for number, n in enumerate(np.random.default_rng(seed).permutation(len(places))):
        owner, place = places[n]
        folds[owner][place] = number % NUM_FOLDS
    return folds


def _of_tokens(window: Window | TextWindow, folds: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """(T,): the fold of each token of a window but its first. is_trained: (T,) bool."""
    of_tokens = np.full(len(is_trained), NOT_TRAINED)
    of_tokens[len(is_trained) - len(window.documents) :] = folds[window.documents]
    return np.where(is_trained, of_tokens, NOT_TRAINED)
