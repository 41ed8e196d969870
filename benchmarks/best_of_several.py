"""How often the best of several arms is called better than the best of others, where all are equally good.

    python benchmarks/best_of_several.py [TRIALS]

Documents that are hard or easy for all arms alike, and a little noise of each arm's own; ensembles and merges of one
family (`alike`) share half of that noise. docs/statistics.md quotes the table.
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
from scipy.special import stdtrit

from ensemble_server.ensembles.comparison.simultaneous import simultaneous_level

LEVEL = 0.95
NUM_TRIALS = 1000


def rates(num_ours: int, num_theirs: int, num_items: int, alike: bool, num_trials: int) -> np.ndarray:
    """Shares of trials in which the interval of best against best leaves out zero: as one pair, by Bonferroni, by us;
    then the half width of ours over Bonferroni's."""
    rng = np.random.default_rng(num_items + num_ours)
    found = np.zeros(4)
    freedom = num_items - 1
    for _ in range(num_trials):
        own = rng.standard_normal((num_ours + num_theirs, num_items))
        if alike:
            own[:num_ours] += rng.standard_normal(num_items)
            own[num_ours:] += rng.standard_normal(num_items)
        influences = (own - own.mean(axis=1, keepdims=True)) / num_items
        places = list(product(range(num_ours), range(num_ours, num_ours + num_theirs)))
        pairs = np.array([influences[one] - influences[other] for one, other in places])
        level = simultaneous_level(pairs, level=LEVEL, freedom=freedom, num_draws=2000)
        means = own.mean(axis=1)
        gaps = own[int(means[:num_ours].argmin())] - own[num_ours + int(means[num_ours:].argmin())]
        error = gaps.std(ddof=1) / np.sqrt(num_items)
        levels = (LEVEL, 1 - (1 - LEVEL) / len(places), level)
        halves = [error * float(stdtrit(freedom, (1 + one) / 2)) for one in levels]
        found[:3] += [abs(gaps.mean()) > half for half in halves]
        found[3] += halves[2] / halves[1]
    return found / num_trials


def main() -> None:
    num_trials = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_TRIALS
    print("| ensembles × merges | documents | arms | as one pair | Bonferroni | together | width over Bonferroni's |")
    print("|---|---|---|---|---|---|---|")
    for num_ours, num_theirs in ((4, 1), (10, 1), (4, 6)):
        for num_items in (12, 60):
            for alike in (False, True):
                found = rates(num_ours, num_theirs, num_items, alike, num_trials)
                shares = " | ".join(f"{100 * share:.1f} %" for share in found[:3])
                kind = "alike" if alike else "apart"
                print(f"| {num_ours} × {num_theirs} | {num_items} | {kind} | {shares} | {found[3]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
