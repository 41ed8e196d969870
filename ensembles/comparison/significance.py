"""Tests of "these two models are equally good" on the same items, and Holm's correction over many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtr

MAX_EXACT_SIGNS = 16  # differences other than zero up to which all 2^n sign patterns are looked at


@dataclass(frozen=True)
class McNemar:
    """Items that only one of two models got right, and the two-sided exact p-value of their imbalance."""

    only_model: int
    only_baseline: int
    p_value: float


def mcnemar(model_is_right: np.ndarray, baseline_is_right: np.ndarray) -> McNemar:
    """McNemar's test (1947), exact: among items that divide the models, each is right in half of them.

    Both (num_items,) of bool. Without any such item p is 1.
    """
    model, baseline = np.asarray(model_is_right, dtype=bool), np.asarray(baseline_is_right, dtype=bool)
    only_model, only_baseline = int((model & ~baseline).sum()), int((baseline & ~model).sum())
    divided = only_model + only_baseline
    p_value = min(1.0, 2 * float(bdtr(min(only_model, only_baseline), divided, 0.5))) if divided else 1.0
    return McNemar(only_model, only_baseline, p_value)


def sign_flip(differences: np.ndarray, *, seed: int = 0, num_flips: int = 10_000) -> float:
    """Two-sided p-value of "the differences are symmetric about zero", by flipping signs at random (Fisher 1935).

    differences: (num_items,), model less baseline; their sum is the statistic, so it serves for means and for ratios
    with one denominator alike. Exact with up to MAX_EXACT_SIGNS differences other than zero; else (1 + hits) /
    (1 + num_flips), which never gives a p of zero (Phipson & Smyth 2010).
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum())
    tolerance = 1e-12 * np.abs(differences).sum()  # equal sums that rounding made different are equal
    if len(differences) <= MAX_EXACT_SIGNS:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ differences) >= observed - tolerance))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, num_flips, 1000):
        signs = 2 * rng.integers(2, size=(min(1000, num_flips - start), len(differences)), dtype=np.int8) - 1
        hits += int((np.abs(signs @ differences) >= observed - tolerance).sum())
    return (1 + hits) / (1 + num_flips)


def smallest_mcnemar_p(num_items: int) -> float:
    """What `mcnemar` says if all items divide the models the same way: with fewer items no p can be smaller."""
    return min(1.0, 2.0 ** (1 - num_items))


def smallest_sign_flip_p(num_items: int, *, num_flips: int = 10_000) -> float:
    """The same for `sign_flip`: 2 of 2^n patterns, or one more than none of the drawn ones."""
    return min(1.0, 2.0 ** (1 - num_items)) if num_items <= MAX_EXACT_SIGNS else 1 / (1 + num_flips)


def student_t(value: float, standard_error: float, freedom: float) -> float:
    """Two-sided p-value of "the true figure is 0", for a figure that is about normal.

    However few the items, p can be as small as the figure is far from 0: it is not bounded by 2^-n as that of sign
    patterns is. 1 if nothing differs.
    """
    if standard_error <= 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stdtr(freedom, -abs(value) / standard_error))


@dataclass(frozen=True)
class Spread:
    """The standard error of a figure, and the degrees of freedom of its tails."""

    standard_error: float
    freedom: float


def combined(parts: Sequence[Spread]) -> Spread:
    """Of a sum of independent figures; degrees of freedom after Welch and Satterthwaite (1946)."""
    variances = [part.standard_error**2 for part in parts]
    total = sum(variances)
    if total <= 0:
        return Spread(0.0, max(part.freedom for part in parts))
    weight = sum(variance**2 / part.freedom for variance, part in zip(variances, parts, strict=True))
    return Spread(math.sqrt(total), total**2 / weight)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (Holm 1979): [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06].

    Calling those up to 0.05 significant is wrong about any of them in at most 5% of such families, however they depend
    on each other.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
