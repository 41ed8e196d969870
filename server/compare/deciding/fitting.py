"""The weights of a probability average, fitted to development text.

Arithmetic pools by EM, geometric ones by convex optimisation, of posterior ones the share, on a grid.

The members read the text once, in the windows in which it would be scored (`server.compare.measures.windows`). What
they gave the tokens that came is kept, (K, T) numbers. The geometric pool needs whole distributions, which are too
large to keep all: it is fitted on a sample of positions, as many as fit into `sample_bytes` as float16 (4 members of
49152 tokens: 1365 positions in 512 MiB), drawn evenly with a seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Required, TypedDict, Unpack

import numpy as np

from ensemble_server.ensembles.base import Mixture, MixtureHost, PoolName
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.fitting.em import fit_arithmetic
from ensemble_server.ensembles.fitting.share import fit_share
from ensemble_server.ensembles.pooling import effective_weights, gated
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.ensembles.spelling import ROW
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.windows import TextWindow, Window, cut_text_windows, cut_windows
from ensemble_server.server.config.averages import model_named
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    import torch

    from ensemble_server.ensembles.fitting.log_linear import Constraint
    from ensemble_server.server.config.blocks import Config
    from ensemble_server.server.hosting import Hosting

SAMPLE_BYTES = 512 * 2**20
CHUNK_POSITIONS = 64  # of a sample, that are float32 at a time


class ReadingSettings(TypedDict, total=False):
    """How members read the texts of a fit; the defaults are those of `WeightFit.read`.

    `window`, `stride`: tokens; `sample_bytes`, `seed`: of the sample of positions that a geometric pool is fitted on;
    `on_progress` hears how many windows are read, and how many there are.
    """

    window: Required[int]
    stride: int | None
    sample_bytes: int
    seed: int
    on_progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class FittedWeights:
    """`weights`: member -> weight, zeros included; `share`: of the posterior pool, else None.

    `nats_per_token`: of the fitted pool on the `num_tokens` tokens that it was fitted to; bytes, and per byte, if
    `unit` says so: where members have different vocabularies.
    """

    pool: PoolName
    weights: Mapping[str, float]
    share: float | None
    nats_per_token: float
    num_tokens: int
    unit: Literal["token", "byte"] = "token"


@dataclass(frozen=True)
class MemberReading:
    """One text as the members read it. `logprobs`: what they gave the tokens of each window but its first, (K, t); or
    its bytes, where they have different vocabularies.

    `is_counted`: whether each of these tokens is one to fit to, (t,) of bool for each window; `views`: what a gate
    knows of each of them, (2, K, t) of the members that are not at rest, if that was asked for (`pooling.gated.views`).
    """

    windows: Sequence[Window | TextWindow]
    logprobs: Sequence[np.ndarray]
    is_counted: Sequence[np.ndarray]
    views: Sequence[np.ndarray] = ()


@dataclass
class _PositionSample:
    """Whole distributions at `wanted` positions: (window, token) -> kept. A visitor of one window at a time."""

    wanted: Mapping[int, np.ndarray]
    chunks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def keep(self, window: int, first: int, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        """`first`: the place in its window of the first target."""
        import torch

        places = self.wanted.get(window, np.empty(0, dtype=np.int64)) - first
        places = torch.as_tensor(places[(places >= 0) & (places < len(targets))], device=targets.device)
        if len(places):
            floored = logprobs[:, places].clamp(min=torch.finfo(torch.float16).min)
            self.chunks.append((floored.half().cpu(), targets[places].cpu()))

    def passes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for logprobs, targets in self.chunks:
            for start in range(0, len(targets), CHUNK_POSITIONS):
                part = slice(start, start + CHUNK_POSITIONS)
                yield logprobs[:, part].float(), targets[part]


@dataclass
class _Views:
    """`rows`: of the members that are not at rest."""

    rows: Sequence[int]
    by_window: list[np.ndarray] = field(default_factory=list)

    def keep(self, logprobs: torch.Tensor) -> None:
        """The next chunk of the last window."""
        self.by_window[-1] = np.concatenate([self.by_window[-1], gated.views(logprobs[self.rows])], axis=2)


def check_fittable(config: Config, model_name: str) -> None:
    """Raise `UnknownModelError` or `ConfigError` that says why there is nothing to fit. Looks at the config only."""
    entry = model_named(config, model_name, param="model")
    if not isinstance(entry, ProbabilityAverage.Config):
        raise ConfigError(
            f"model {model_name!r} has no weights that text could decide: only a probability_average pools next-token "
            "distributions"
        )
    if entry.gate is not None:
        raise ConfigError(
            f"model {model_name!r} has a gate, which was trained for its share; leave `gate` out, and train it anew "
            "with --gate once the share is fitted"
        )
    if len(entry.members) < 2:
        raise ConfigError(f"model {model_name!r} has one member, {min(entry.members)!r}: there is nothing to weigh")


async def fit_weights(
    hosting: Hosting,
    model_name: str,
    texts: Sequence[Documents],
    *,
    constraint: Constraint = "simplex",
    **reading: Unpack[ReadingSettings],
) -> FittedWeights:
    """The weights of all members of the probability average `model_name` that make `texts` most likely.

    Of a posterior pool the share is fitted, its weights stay as they are. Raises `ConfigError` for a model that cannot
    be fitted.
    """
    fit = await WeightFit.read(hosting, model_name, texts, **reading)
    return await in_own_thread(fit.solve, constraint)


@dataclass(frozen=True)
class WeightFit:
    """Texts read by the members of a pool: all that a fit needs. Made by `WeightFit.read`."""

    model: ProbabilityAverage
    readings: Sequence[MemberReading]
    sample: _PositionSample
    unit: Literal["token", "byte"] = "token"

    @classmethod
    async def read(
        cls,
        hosting: Hosting,
        model_name: str,
        texts: Sequence[Documents],
        *,
        window: int,
        stride: int | None = None,
        counted: Sequence[np.ndarray] | None = None,
        sample_bytes: int = SAMPLE_BYTES,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        keeps_views: bool = False,
    ) -> WeightFit:
        """Let the members read `texts`. `counted`: for each text, which of its documents to fit to (bool); default all.
        `keeps_views`: whether what a gate has to know is kept.

        Raises `ConfigError` if the model cannot be fitted, or the window is longer than its context.
        """
        check_fittable(hosting.config, model_name)
        model = hosting.models[model_name]
        assert isinstance(model, ProbabilityAverage), "as its config says"
        if model.max_model_len is not None and model.max_model_len < window:
            raise ConfigError(
                f"the context of {model_name!r} holds {model.max_model_len} tokens, the window is {window}"
            )
        surface = hosting.surface(model_name)
        assert surface is not None, "members of a mixture are hosted"
        everyone = Mixture(dict.fromkeys(model.members, 1.0), vocabulary=model.mixture.vocabulary)
        is_over_bytes = model.host.averages_over(everyone) == "bytes"
        cut = [
            await asyncio.to_thread(
                cut_text_windows if is_over_bytes else cut_windows, surface, documents, window=window, stride=stride
            )
            for documents in texts
        ]
        masks = [_counted(windows, None if counted is None else counted[n]) for n, windows in enumerate(cut)]
        sample = _PositionSample({})
        if model.mixture.pool == "geometric":
            limit = sample_bytes // (2 * len(model.members) * (ROW if is_over_bytes else surface.vocab_size))
            sample = _PositionSample(_drawn([mask for of_text in masks for mask in of_text], limit, seed))
        weighed = [model.members.index(member) for member in model.mixture.weights]
        num_windows, done = sum(len(windows) for windows in cut), 0
        readings = []
        for windows, of_text in zip(cut, masks, strict=True):
            logprobs, views = [], _Views(weighed) if keeps_views else None
            for piece in windows:
                logprobs.append(await _read(model.host, model.members, piece, done, sample, views))
                done += 1
                if on_progress is not None:
                    on_progress(done, num_windows)
            known = [mask[len(mask) - part.shape[1] :] for mask, part in zip(of_text, logprobs, strict=True)]
            readings.append(MemberReading(windows, logprobs, known, () if views is None else views.by_window))
        return cls(model, readings, sample, "byte" if is_over_bytes else "token")

    def solve(self, constraint: Constraint = "simplex") -> FittedWeights:
        """Heavy for a geometric pool: the sample is gone over some twenty times. Raises `ConfigError` for no tokens."""
        members, pool = self.model.members, self.model.mixture.pool
        logprobs = [part for reading in self.readings for part in reading.logprobs]
        masks = [mask for reading in self.readings for mask in reading.is_counted]
        if not any(mask.any() for mask in masks):
            raise ConfigError("there is no token to fit weights to; give more text")
        if pool == "posterior":
            names = list(self.model.mixture.weights)
            rows = [members.index(name) for name in names]
            prior = effective_weights(list(self.model.mixture.weights.values()))
            found = fit_share([part[rows] for part in logprobs], prior, counted=masks)
            nats, num_tokens = min(found.nats_per_token), sum(int(mask.sum()) for mask in masks)
            return FittedWeights(pool, dict(self.model.config.members), found.share, nats, num_tokens, self.unit)
        if pool == "arithmetic":
            em = fit_arithmetic(
                np.concatenate([part[:, mask] for part, mask in zip(logprobs, masks, strict=True)], axis=1)
            )
            weights = dict(zip(members, em.weights.tolist(), strict=True))
            return FittedWeights(pool, weights, None, em.nats_per_token[-1], em.num_tokens, self.unit)
        from ensemble_server.ensembles.fitting.log_linear import fit_geometric

        found = fit_geometric(self.sample.passes, constraint=constraint)
        weights = dict(zip(members, found.weights.tolist(), strict=True))
        return FittedWeights(pool, weights, None, found.nats_per_token, found.num_tokens, self.unit)


def _counted(windows: Sequence[Window | TextWindow], documents: np.ndarray | None) -> list[np.ndarray]:
    """For each window: which of its tokens but the first, or its bytes, are scored there and belong to a document that
    counts."""
    masks = []
    for window in windows:
        mask = np.zeros(window.num_read, dtype=bool)
        mask[window.num_read - len(window.documents) :] = True if documents is None else documents[window.documents]
        masks.append(mask)
    return masks


def _drawn(masks: Sequence[np.ndarray], limit: int, seed: int) -> dict[int, np.ndarray]:
    """At most `limit` (but at least one) of the counted positions: window -> places, ascending."""
    places = np.array([(window, place) for window, mask in enumerate(masks) for place in np.flatnonzero(mask)])
    if len(places) > limit:
        chosen = np.random.default_rng(seed).choice(len(places), size=max(1, limit), replace=False)
        places = places[np.sort(chosen)]
    return {window: places[places[:, 0] == window, 1] for window in {int(window) for window, _ in places}}


async def _read(
    host: MixtureHost,
    members: Sequence[str],
    window: Window | TextWindow,
    index: int,
    sample: _PositionSample,
    views: _Views | None,
) -> np.ndarray:
    """What each member gave the tokens of a window but its first, or its bytes: (K, t) float64. Sampled positions are
    kept, and so is what a gate knows of each token if it has to be."""
    parts = [np.zeros((len(members), 0))]
    if views is not None:
        views.by_window.append(np.zeros((2, len(views.rows), 0)))

    def visit(logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        read = sum(part.shape[1] for part in parts)
        if isinstance(window, TextWindow):  # shown at once, without the first few that not all members expect
            read = window.num_read - len(targets)
        sample.keep(index, read, logprobs, targets)
        if views is not None:
            views.keep(logprobs)
        picked = logprobs.gather(2, targets[None, :, None].expand(len(logprobs), -1, 1))
        parts.append(picked[..., 0].double().cpu().numpy())

    await window.visit(host, members, visit)
    return np.concatenate(parts, axis=1)
