"""How often 95% intervals hold the truth, by number of items, on simulated figures with a known truth.

    python benchmarks/interval_coverage.py

Three kinds: right or wrong (60% against 45%, paired), scores with a skewed difference (exponential), and bits per byte
(documents of 200 to 3000 bytes, costs per byte of a gamma distribution). Prints a Markdown table.
"""

from __future__ import annotations

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.intervals import Estimate

NUM_TRIALS = 2000
NUM_RESAMPLES = 1000
NUM_ITEMS = (8, 10, 20, 50, 200)


def right_or_wrong(rng: np.random.Generator, num_items: int) -> tuple[float, Estimate]:
    difference = (rng.random(num_items) < 0.6) * 1.0 - (rng.random(num_items) < 0.45)
    return 0.15, bootstrap.mean(difference, num_resamples=NUM_RESAMPLES)


def skewed_scores(rng: np.random.Generator, num_items: int) -> tuple[float, Estimate]:
    return 1.0, bootstrap.mean(rng.exponential(size=num_items), num_resamples=NUM_RESAMPLES)


def bits_per_byte(rng: np.random.Generator, num_items: int) -> tuple[float, Estimate]:
    num_bytes = rng.integers(200, 3000, size=num_items).astype(float)
    bits = num_bytes * rng.gamma(4, 0.25, size=num_items)
    return 1.0, bootstrap.ratio(bits, num_bytes, num_resamples=NUM_RESAMPLES)


def main() -> None:
    print("| items | right or wrong | skewed scores | bits per byte |\n|---|---|---|---|")
    for num_items in NUM_ITEMS:
        cells = []
        for simulate in (right_or_wrong, skewed_scores, bits_per_byte):
            rng = np.random.default_rng(num_items)
            hits = 0
            for _ in range(NUM_TRIALS):
                truth, estimate = simulate(rng, num_items)
                hits += truth in estimate.interval
            cells.append(f"{100 * hits / NUM_TRIALS:.1f} %")
        print(f"| {num_items} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
