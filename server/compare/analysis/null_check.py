"""The baseline against itself, where there is nothing to find: does the test find nothing?

Texts: the same model once more, with windows that begin half a window later, so that every token has other context.
Tasks with sampled answers: a second run with other seeds. Neither is exchangeable by construction: figures that depend
on where windows fall, or on the seed, in a way that the standard error does not know of, make these checks fail.

A third check is about neighbours. Documents of one text are taken for as many as their lag leaves
(`ensembles.comparison.dependence`); if blocks of them vary much more than that says, dependence reaches further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ensemble_server.ensembles.comparison.dependence import of_neighbours
from ensemble_server.ensembles.comparison.paired import Comparison
from ensemble_server.server.compare.kept.results import NullCheck

MIN_BLOCKS = 6
TOO_LARGE = 1.5  # times the standard error that is used; 6 blocks of independent items exceed it in 3% of cases


def null_check(measure: str, method: str, compared: Comparison, *, alpha: float) -> NullCheck:
    """`compared`: the baseline against itself."""
    is_significant = compared.p_value < alpha
    return NullCheck(
        measure=measure,
        method=method,
        num_trials=1,
        num_significant=int(is_significant),
        alpha=alpha,
        largest_difference=abs(compared.difference.value),
        has_passed=not is_significant,
    )


def check_of_neighbours(measure: str, influences: Sequence[np.ndarray], *, alpha: float) -> NullCheck | None:
    """`influences`: what each document adds to each arm's difference, (num_documents,) each, in order.

    It has passed if in at most half of the arms blocks of √n neighbours have a standard error that is TOO_LARGE times
    the one that verdicts use. None with too few documents for MIN_BLOCKS blocks. `largest_difference` is that ratio.
    """
    ratios = [ratio for influence in influences if (ratio := _ratio(influence)) is not None]
    if not ratios:
        return None
    num_large = sum(ratio > TOO_LARGE for ratio in ratios)
    return NullCheck(
        measure=measure,
        method="blocks of neighbouring documents against the standard error in use",
        num_trials=len(ratios),
        num_significant=num_large,
        alpha=alpha,
        largest_difference=max(ratios),
        has_passed=num_large <= len(ratios) / 2,
    )


def _ratio(influence: np.ndarray) -> float | None:
    num = len(influence)
    num_blocks = math.isqrt(num)
    if num_blocks < MIN_BLOCKS or not influence.any():
        return None
    sums = np.bincount(np.arange(num) * num_blocks // num, weights=influence)
    of_blocks = math.sqrt(num_blocks / (num_blocks - 1) * float(sums @ sums))
    used = math.sqrt(num / (num - 1) * float(influence @ influence)) * of_neighbours(influence).error_factor
    return of_blocks / used
