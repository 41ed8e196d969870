"""The baseline against itself, where there is nothing to find: does the test find nothing, as often as it should?

Texts: its documents are paired at random and each pair is a "difference"; the same sign-flip test that compares arms
judges them. It should fall below alpha in a share of about alpha of many such pairings. Tasks with sampled answers: a
second run with other seeds against the first.
"""

from __future__ import annotations

import numpy as np

from ensemble_server.ensembles.comparison.paired import Comparison
from ensemble_server.ensembles.comparison.significance import sign_flip
from ensemble_server.server.compare.results import NullCheck

NUM_TRIALS = 200
NUM_FLIPS = 1000  # per trial: enough to tell 5% from more over all trials
TOO_UNLIKELY = 0.001  # that a sound test gives so many false alarms


def null_check_of_text(
    text: str, bits: np.ndarray, num_bytes: np.ndarray, *, seed: int, alpha: float
) -> NullCheck | None:
    """bits, num_bytes: (num_documents,). None with fewer than 12 documents: six pairs cannot reach p < 0.03."""
    from scipy.stats import binom

    scored = num_bytes > 0
    costs = bits[scored] / num_bytes[scored]
    num_pairs = len(costs) // 2
    if num_pairs < 6:
        return None
    rng = np.random.default_rng(seed)
    num_significant, largest = 0, 0.0
    for trial in range(NUM_TRIALS):
        drawn = rng.permutation(costs)
        differences = drawn[:num_pairs] - drawn[num_pairs : 2 * num_pairs]
        num_significant += sign_flip(differences, seed=trial, num_flips=NUM_FLIPS) < alpha
        largest = max(largest, abs(float(differences.mean())))
    return NullCheck(
        measure=f"text {text}",
        method="random halves of the documents",
        num_trials=NUM_TRIALS,
        num_significant=num_significant,
        alpha=alpha,
        largest_difference=largest,
        has_passed=bool(binom.sf(num_significant - 1, NUM_TRIALS, alpha) > TOO_UNLIKELY),
    )


def null_check_of_task(task: str, compared: Comparison, *, alpha: float) -> NullCheck:
    """`compared`: the baseline against itself with other seeds."""
    is_significant = compared.p_value < alpha
    return NullCheck(
        measure=f"task {task}",
        method="a second run with other seeds",
        num_trials=1,
        num_significant=int(is_significant),
        alpha=alpha,
        largest_difference=abs(compared.difference.value),
        has_passed=not is_significant,
    )
