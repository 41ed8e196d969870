"""How often intervals hold the truth where items are few or not independent, before and after, on simulated figures.

    python benchmarks/comparison_levels.py [TRIALS]

Three parts, each a Markdown table: documents of one text that resemble their neighbours; few documents; three seeds of
training. docs/statistics.md quotes them.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.special import stdtrit

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.dependence import of_neighbours
from ensemble_server.ensembles.comparison.replicates import crossed_ratio_difference

NUM_TRIALS = 1500
LEVEL = 0.95


def neighbours(rng: np.random.Generator, num_items: int, lag: float) -> np.ndarray:
    values = rng.standard_normal(num_items)
    for index in range(1, num_items):
        values[index] = lag * values[index - 1] + np.sqrt(1 - lag**2) * values[index]
    return values


def student_half(values: np.ndarray, *, by_lag: bool = False) -> float:
    num = len(values)
    plain = values.std(ddof=1) / np.sqrt(num) * float(stdtrit(num - 1, (1 + LEVEL) / 2))
    return plain * (of_neighbours(values).interval_factor(LEVEL) if by_lag else 1.0)


def in_blocks(values: np.ndarray) -> float:
    """Half of Student's interval over blocks of n^(1/3) neighbours."""
    num_blocks = len(values) // max(1, round(len(values) ** (1 / 3)))
    places = np.arange(len(values)) * num_blocks // len(values)
    sums = np.bincount(places, weights=values - values.mean())
    error = np.sqrt(float(sums @ sums) * num_blocks / (num_blocks - 1)) / len(values)
    return error * float(stdtrit(num_blocks - 1, (1 + LEVEL) / 2))


def print_neighbours(num_trials: int) -> None:
    print("| documents | lag | as independent | in blocks | by their lag |\n|---|---|---|---|---|")
    for num_items in (10, 20, 50):
        for lag in (0.0, 0.4):
            rng = np.random.default_rng(num_items)
            hits = np.zeros(3)
            for _ in range(num_trials):
                values = neighbours(rng, num_items, lag)
                halves = (student_half(values), in_blocks(values), student_half(values, by_lag=True))
                hits += [abs(values.mean()) <= half for half in halves]
            print(f"| {num_items} | {lag:g} | {' | '.join(f'{100 * hit / num_trials:.1f} %' for hit in hits)} |")


def print_few_documents(num_trials: int) -> None:
    print("\n| documents | figures | bootstrap | Student's |\n|---|---|---|---|")
    kinds = {
        "normal": (0.0, lambda rng, num: rng.standard_normal(num)),
        "t, 3 degrees": (0.0, lambda rng, num: rng.standard_t(3, size=num)),
        "exponential": (1.0, lambda rng, num: rng.exponential(size=num)),
    }
    for num_items in (5, 12):
        for name, (truth, draw) in kinds.items():
            rng = np.random.default_rng(num_items)
            hits = np.zeros(2)
            for _ in range(num_trials):
                values = draw(rng, num_items)
                interval = bootstrap.mean(values, num_resamples=800).interval
                assert interval is not None, "there are several items"
                hits += [truth in interval, abs(values.mean() - truth) <= student_half(values)]
            print(f"| {num_items} | {name} | {' | '.join(f'{100 * hit / num_trials:.1f} %' for hit in hits)} |")


def print_seeds(num_trials: int) -> None:
    print("\n| seeds | what varies most | held the truth |\n|---|---|---|")
    for num_seeds in (2, 3):
        for name, by_seed, by_document, by_both in (
            ("seeds", 1, 0.3, 0.3),
            ("documents", 0.3, 1, 0.3),
            ("all", 1, 1, 1),
        ):
            rng = np.random.default_rng(num_seeds)
            hits = 0
            for _ in range(num_trials):
                shape = num_seeds, 20
                figures = by_seed * rng.standard_normal((num_seeds, 1)) + np.sqrt(20) * (
                    by_document * rng.standard_normal((1, 20)) + by_both * rng.standard_normal(shape)
                )
                ones = np.ones(shape)
                interval = crossed_ratio_difference(figures, ones, 0 * ones, ones).interval
                hits += interval is not None and 0 in interval
            print(f"| {num_seeds} | {name} | {100 * hits / num_trials:.1f} % |")


def main() -> None:
    num_trials = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_TRIALS
    print_neighbours(num_trials)
    print_few_documents(num_trials)
    print_seeds(num_trials)


if __name__ == "__main__":
    main()
