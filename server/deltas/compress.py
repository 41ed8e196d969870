"""A fine-tune compressed against its base: by a method, within a budget, and what is lost by it.

A budget is a part of what the changed matrices take in 16 bits: 1/16 is a bit per weight. What is kept as it is (norms,
biases, embeddings) comes on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.deltas.difference import Difference, as_matrix, linear_layers
from ensemble_server.server.deltas.dropping import drop_and_rescale
from ensemble_server.server.deltas.low_rank import Decomposition, decompose, importance, low_rank
from ensemble_server.server.deltas.mixed_precision import mixed_precision
from ensemble_server.server.deltas.reading import Loss, Yardstick, input_moments, windows_of
from ensemble_server.server.deltas.signs import sign_planes
from ensemble_server.server.weights.delta_folder import METHODS, DeltaMethod
from ensemble_server.server.weights.deltas import LowRank, MatrixDelta, MixedLowRank, SignPlanes, Sparse

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    method: DeltaMethod
    budget: Fraction


@dataclass(frozen=True, eq=False)
class Compressed:
    """`loss`: None where no text was given to measure it on."""

    plan: Plan
    matrices: Mapping[str, MatrixDelta]
    matrices_bytes: int
    kept_bytes: int
    num_weights: int
    loss: Loss | None

    @property
    def num_bytes(self) -> int:
        return self.matrices_bytes + self.kept_bytes

    def facts(self) -> dict[str, Any]:
        """As JSON has them."""
        return {
            "method": self.plan.method,
            "budget": str(self.plan.budget),
            "bytes": {"matrices": self.matrices_bytes, "kept": self.kept_bytes, "total": self.num_bytes},
            "bits_per_weight": 8 * self.matrices_bytes / self.num_weights,
            "num_weights": self.num_weights,
            "num_matrices": len(self.matrices),
            "spread": self.spread,
            "loss": None if self.loss is None else asdict(self.loss),
        }

    @property
    def spread(self) -> str:
        """What the matrices were given, least to most: ranks, planes, or the part of the weights that is left."""
        found = list(self.matrices.values())
        if self.plan.method == "dare":
            return f"density {sum(len(one.values) for one in found if isinstance(one, Sparse)) / self.num_weights:.4f}"
        ranks = sorted(_rank(one) for one in found)
        word = "planes" if self.plan.method == "bitdelta" else "rank"
        return f"{word} {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"


def parse_budget(text: str) -> Fraction:
    """ "1/16" or "0.0625". Raises `ConfigError`."""
    try:
        budget = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError) as exc:
        raise ConfigError(f"budget {text!r} is no number; give a part of 1 such as 1/16") from exc
    if budget <= 0:
        raise ConfigError(f"budget {text!r} must be above 0; 1/16 is a bit per weight")
    return budget


def check_method(method: str, *, is_calibrated: bool) -> DeltaMethod:
    """Raises `ConfigError`."""
    known_methods: dict[str, DeltaMethod] = {known: known for known in METHODS}
    if (known := known_methods.get(method)) is None:
        raise ConfigError(f"there is no method {method!r} to compress by; known are {', '.join(METHODS)}")
    if known == "dare" and is_calibrated:
        raise ConfigError("dare drops weights at random: there is nothing to calibrate; leave out --calibrate")
    return known


def compressed(
    difference: Difference,
    plans: Sequence[Plan],
    *,
    calibrate: Path | None = None,
    text: Path | None = None,
    max_tokens: int,
    seed: int = 0,
    on_stage: OnStage = lambda stage: None,
) -> Iterator[Compressed]:
    """One for each plan, in order. calibrate, text: files; of each at most `max_tokens` are read.

    Raises `ConfigError` for a file that cannot be read, and for a budget in which nothing fits.
    """
    moments: dict[str, torch.Tensor] = {}
    yardstick = None
    if text is not None:
        yardstick = Yardstick(difference, windows_of(text, difference.surface, max_tokens=max_tokens))
    if calibrate is not None:
        windows = windows_of(calibrate, difference.surface, max_tokens=max_tokens)
        on_stage("reading the text to calibrate by")
        moments = input_moments(difference.finetune, windows)
    importances = _importances(difference, moments)
    decompositions: dict[str, Decomposition] = {}
    if any(plan.method in {"svd", "delta-come"} for plan in plans):
        for number, (path, delta) in enumerate(difference.matrices.items(), start=1):
            if number % 20 == 1:
                on_stage(f"decomposing matrix {number} of {len(difference.matrices)}")
            decompositions[path] = decompose(delta, moments.get(path), importance=importances[path])
    kept_bytes = sum(kept.numel() * kept.element_size() for kept in difference.kept.values())
    for plan in plans:
        on_stage(f"compressing: {plan.method} at {plan.budget}")
        budget = float(plan.budget) * 2 * difference.num_weights
        matrices: dict[str, MatrixDelta] = dict(
            _matrices(plan, difference, decompositions, moments, importances, budget, seed)
        )
        if not matrices:
            raise ConfigError(
                f"nothing of {plan.method} fits in a budget of {plan.budget}, which is {budget:.0f} bytes for "
                f"{difference.num_weights} weights; give a larger one"
            )
        loss = None
        if yardstick is not None:
            on_stage(f"measuring: {plan.method} at {plan.budget}")
            loss = yardstick.measure(matrices)
        num_bytes = sum(delta.num_bytes for delta in matrices.values())
        yield Compressed(plan, matrices, num_bytes, kept_bytes, difference.num_weights, loss)


def _matrices(
    plan: Plan,
    difference: Difference,
    decompositions: Mapping[str, Decomposition],
    moments: Mapping[str, torch.Tensor],
    importances: Mapping[str, float],
    budget: float,
    seed: int,
) -> Iterator[tuple[str, MatrixDelta]]:
    match plan.method:
        case "svd":
            return low_rank(decompositions, budget)
        case "delta-come":
            return mixed_precision(difference.matrices, decompositions, moments, budget)
        case "bitdelta":
            return sign_planes(difference.matrices, moments, importances, budget)
        case "dare":
            return drop_and_rescale(difference.matrices, budget, seed=seed)


def _importances(difference: Difference, moments: Mapping[str, torch.Tensor]) -> dict[str, float]:
    layers: dict[str, Any] = dict(linear_layers(difference.finetune))
    return {
        path: importance(as_matrix(layers[path], layers[path].weight), moments.get(path))
        for path in difference.matrices
    }


def _rank(delta: MatrixDelta) -> int:
    match delta:
        case LowRank():
            return len(delta.a)
        case MixedLowRank():
            return len(delta.bits)
        case SignPlanes():
            return len(delta.signs)
    return 0
