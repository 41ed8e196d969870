"""What each model pays for each document of a text: nats, bytes and tokens, from which bits per byte follow.

    bpb = (sum of -log2 p(token | earlier tokens of its window)) / (UTF-8 bytes of the scored tokens)

`server.compare.measures.windows` says what a window is and which tokens are scored. Each window is scored as the server
scores a prompt (`prompt_logprobs`) that consists of it: so the weights of a posterior pool start from the prior in
every window, and follow the evidence of its tokens, those that are only context included.

Members read each window once for all mixtures over them. Arithmetic and posterior pools need only what the members gave
the tokens that came; a geometric pool is normalised over the vocabulary while the distributions are there, and whether
a selective average leaves a token to its main member is decided then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import (
    DistributionModel,
    GenerationRequest,
    Mixture,
    MixtureHost,
    Model,
    Sampling,
    collect,
)
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.fitting.share import posterior_logprobs
from ensemble_server.ensembles.pooling import effective_weights
from ensemble_server.server.compare.measures.byte_scores import is_over_bytes
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.pooled_text import PooledText, needs_whole_rows
from ensemble_server.server.compare.measures.remote_tokens import remote_surface
from ensemble_server.server.compare.measures.windows import TextWindow, Window, cut_text_windows, cut_windows
from ensemble_server.server.engines.remote.remote import RemoteChat

if TYPE_CHECKING:
    import torch

    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

WINDOW = 512


@dataclass(frozen=True)
class TextScores:
    """What one model pays for each document; all (num_documents,) float64. A document without scored tokens has zeros.

    `nats`: -log p of the scored tokens; `num_bytes`, `num_tokens`: of the same tokens.
    """

    nats: np.ndarray
    num_bytes: np.ndarray
    num_tokens: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / np.log(2) / self.num_bytes.sum())

    @property
    def perplexity(self) -> float:
        """Per token, so it depends on the tokenizer; bits per byte do not."""
        return float(np.exp(self.nats.sum() / self.num_tokens.sum()))


@dataclass(frozen=True)
class NotScored:
    """Why a model has no figure on a text."""

    reason: str


async def measure_text(
    hosting: Hosting,
    arms: Mapping[str, str],
    documents: Documents,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    shift: int = 0,
    priority: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, TextScores | NotScored]:
    """Score `documents` under the models `arms` (arm -> name of a model of `hosting`), in their order.

    Mixtures over hosted members of one vocabulary share one pass of their members. `stride` defaults to window - 1;
    `shift`: so many tokens later all windows begin. Mixtures over members of different vocabularies are scored over
    bytes, in windows that have the size of these in tokens of their first member (`cut_text_windows`).
    `on_progress` hears how many windows are done, and how many there are in all. A model that cannot score text is
    `NotScored`, with the reason; errors of the engine are raised, and `ConfigError` for a window that is impossible.
    """
    scores: dict[str, TextScores | NotScored] = {}
    mixtures: dict[str, DistributionModel] = {}
    others: dict[str, Model] = {}
    surfaces: dict[str, Surface | None] = {}  # of remote models
    for arm, name in arms.items():
        model = hosting.models[name]
        if model.max_model_len is not None and model.max_model_len < window:
            scores[arm] = NotScored(
                f"its context holds {model.max_model_len} tokens, the window is {window}; choose a smaller window"
            )
        elif isinstance(model, DistributionModel):
            mixtures[arm] = model
        elif isinstance(model, RemoteChat):
            others[arm] = model
            surfaces[arm] = await asyncio.to_thread(remote_surface, hosting, name)
            if surfaces[arm] is None:
                del others[arm]
                scores[arm] = NotScored(
                    f"model {name!r} gives text, not probabilities of one that is given: its entry has no `tokenizer`"
                )
        elif hosting.surface(name) is None:
            scores[arm] = NotScored(f"model {name!r} gives text, not probabilities of a text that is given")
        else:
            others[arm] = model

    async def windows_of(arm: str) -> Sequence[Window | TextWindow]:
        surface, model = surfaces.get(arm) or hosting.surface(arms[arm]), hosting.models[arms[arm]]
        assert surface is not None, "models without one are not scored"
        cut = cut_text_windows if is_over_bytes(model) else cut_windows
        return await asyncio.to_thread(cut, surface, documents, window=window, stride=stride, shift=shift)

    plans: list[tuple[Mapping[str, Mixture] | str, Sequence[Window | TextWindow]]] = []
    for group in _groups(mixtures):
        try:
            plans.append(({arm: mixtures[arm].mixture for arm in group}, await windows_of(group[0])))
        except UnsupportedError as exc:
            scores |= dict.fromkeys(group, NotScored(str(exc)))
    plans += [(arm, await windows_of(arm)) for arm in others]

    progress = _Progress(sum(len(windows) for _, windows in plans), on_progress)
    for arms_or_arm, windows in plans:
        if isinstance(arms_or_arm, str):
            model = others[arms_or_arm]
            if isinstance(model, RemoteChat):
                scores[arms_or_arm] = await _score_remotely(model, windows, len(documents), progress)
            else:
                scores[arms_or_arm] = await _score_by_prompts(model, windows, len(documents), progress)
        else:
            host = mixtures[next(iter(arms_or_arm))].host
            begun = progress.done
            try:
                scores |= await score_mixtures(
                    host, arms_or_arm, windows, len(documents), priority=priority, on_window=progress.advance
                )
            except RequestError as exc:  # of different vocabularies: one may read a text in more tokens, or change it
                scores |= dict.fromkeys(arms_or_arm, NotScored(str(exc)))
                progress.advance(len(windows) - (progress.done - begun))
    return {arm: scores[arm] for arm in arms}


class _Progress:
    def __init__(self, total: int, listener: Callable[[int, int], None] | None) -> None:
        self.done, self._total, self._listener = 0, total, listener

    def advance(self, by: int = 1) -> None:
        self.done += by
        if self._listener is not None:
            self._listener(self.done, self._total)


def _groups(mixtures: Mapping[str, DistributionModel]) -> list[list[str]]:
    """Arms whose members can be read in one pass: on one host, of one vocabulary; or over bytes, in windows of the same
    first member."""
    groups: list[list[str]] = []
    for arm, model in mixtures.items():
        for group in groups:
            first = mixtures[group[0]]
            if first.host is model.host and _share_a_pass(model.host, first.mixture, model.mixture):
                group.append(arm)
                break
        else:
            groups.append([arm])
    return groups


def _share_a_pass(host: MixtureHost, one: Mixture, other: Mixture) -> bool:
    kinds = {host.averages_over(one), host.averages_over(other)}
    if "bytes" in kinds:
        return len(kinds) == 1 and next(iter(one.weights)) == next(iter(other.weights))
    everyone = Mixture(dict.fromkeys((*one.weights, *other.weights), 1.0))
    try:
        return host.averages_over(everyone) == "tokens"
    except ModelLoadError:
        return False


# --- mixtures: one pass of the members -------------------------------------------------------------------------------


async def score_mixtures(
    host: MixtureHost,
    mixtures: Mapping[str, Mixture],
    windows: Sequence[Window | TextWindow],
    num_documents: int,
    *,
    priority: int = 1,
    on_window: Callable[[], None] | None = None,
) -> dict[str, TextScores]:
    """`measure_text` for mixtures that can be read in one pass. `on_window` hears of every window."""
    members = list(dict.fromkeys(member for mixture in mixtures.values() for member in mixture.weights))
    place = {member: row for row, member in enumerate(members)}
    whole = {arm: mixture for arm, mixture in mixtures.items() if needs_whole_rows(mixture)}
    logprobs: dict[str, list[np.ndarray]] = {arm: [] for arm in mixtures}  # of the scored tokens, window by window
    for window in windows:
        reading = _Reading(whole, place)
        await window.visit(host, members, reading.visit, priority=priority)
        for arm, mixture in mixtures.items():
            if arm in whole:
                of_window = reading.pooled[arm].logprobs
            else:
                rows = [place[member] for member in mixture.weights]
                of_window = mixture_logprobs(mixture, reading.of_members[rows])
            logprobs[arm].append(scored_part(window, of_window))
        if on_window is not None:
            on_window()
    return {arm: by_document(windows, parts, num_documents) for arm, parts in logprobs.items()}


class _Reading:
    """What is kept of one window: what each member gave what came, and each mixture of `whole` (nats)."""

    def __init__(self, whole: Mapping[str, Mixture], place: Mapping[str, int]) -> None:
        self._num_members = len(place)
        self._of_members: list[np.ndarray] = []  # (K, t) each
        self.pooled = {arm: PooledText(mixture, place) for arm, mixture in whole.items()}

    @property
    def of_members(self) -> np.ndarray:
        """(K, T) float64; T: of how many tokens or bytes something was expected."""
        return np.concatenate([np.zeros((self._num_members, 0)), *self._of_members], axis=1)

    def visit(self, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        index = targets[None, :, None].expand(len(logprobs), -1, 1)
        self._of_members.append(logprobs.gather(2, index)[..., 0].double().cpu().numpy())
        for pooled in self.pooled.values():
            pooled.take(logprobs, targets)


def mixture_logprobs(mixture: Mixture, of_members: np.ndarray) -> np.ndarray:
    """What an arithmetic or posterior mixture gives the tokens of one window. of_members: (K, T) nats -> (T,).

    Of mixtures that are pooled at every token: see `pooled_text` for others.
    """
    is_moved = mixture.when is not None or mixture.gate is not None
    assert not is_moved or len(mixture.weights) == 1, "whole distributions are needed"
    prior = effective_weights(list(mixture.weights.values()))
    if mixture.pool == "posterior" and len(prior) > 1:
        return posterior_logprobs(of_members, prior, mixture.share)
    return np.logaddexp.reduce(np.log(prior)[:, None] + of_members, axis=0)


def scored_part(window: Window | TextWindow, logprobs: np.ndarray) -> np.ndarray:
    """Of what was given to all tokens or bytes of a window, (T,), what is scored there: the end of it."""
    return logprobs[max(0, len(logprobs) - len(window.documents)) :]


def by_document(
    windows: Sequence[Window | TextWindow], logprobs: Sequence[np.ndarray], num_documents: int
) -> TextScores:
    """`logprobs`: what the scored tokens or bytes of each window were given, nats; fewer where not all members could
    expect the first of them."""
    parts = list(zip(windows, logprobs, strict=True))
    if not parts:
        return TextScores(*np.zeros((3, num_documents)))
    documents = np.concatenate([window.documents[len(window.documents) - len(part) :] for window, part in parts])
    num_bytes = np.concatenate([window.num_bytes[len(window.num_bytes) - len(part) :] for window, part in parts])
    num_tokens = np.concatenate([window.num_tokens[len(window.num_tokens) - len(part) :] for window, part in parts])
    return TextScores(
        np.bincount(documents, -np.concatenate(logprobs), num_documents),
        np.bincount(documents, num_bytes, num_documents),
        np.bincount(documents, num_tokens, num_documents),
    )


# --- any other model: prompt by prompt -------------------------------------------------------------------------------


async def _score_by_prompts(
    model: Model, windows: Sequence[Window | TextWindow], num_documents: int, progress: _Progress
) -> TextScores | NotScored:
    logprobs = []
    for done, window in enumerate(windows):
        assert isinstance(window, Window), "only mixtures are over bytes"
        request = GenerationRequest(
            prompt=window.token_ids, prompt_logprobs=0, sampling=Sampling(max_tokens=0), priority=1
        )
        try:
            answer = await collect(model, request)
        except UnsupportedError as exc:
            progress.advance(len(windows) - done)
            return NotScored(str(exc))
        if answer.prompt is None or len(answer.prompt.tokens) != len(window.token_ids):
            progress.advance(len(windows) - done)
            return NotScored(f"model {model.name!r} gave no probabilities of its prompt")
        logprobs.append(np.array([token.logprob for token in answer.prompt.tokens[window.first_scored :]]))
        progress.advance()
    return by_document(windows, logprobs, num_documents)


async def _score_remotely(
    model: RemoteChat, cut: Sequence[Window | TextWindow], num_documents: int, progress: _Progress
) -> TextScores | NotScored:
    """By requests, as many at once as the model's entry allows. The first goes alone: it shows whether the remote end
    scores texts at all."""
    windows = [window for window in cut if isinstance(window, Window)]  # all are: a single model is not over bytes

    async def scored(window: Window) -> np.ndarray:
        nats = await model.score(window.token_ids)
        progress.advance()
        return np.array(nats[window.first_scored - 1 :])

    try:
        logprobs = [await scored(window) for window in windows[:1]]
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(scored(window)) for window in windows[1:]]
    except UnsupportedError as exc:
        progress.advance(len(windows))
        return NotScored(str(exc))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one is enough: they fail for one reason
    return by_document(windows, [*logprobs, *(one.result() for one in running)], num_documents)
