"""When a majority of systems is worth more than the best of them: recorded pools, and simulated ones of known kind.

Compared on the same rows: the best system (chosen on other rows), the majority of all, the majority of the best five
(chosen on other rows), and the majority under fitted weights (`ensemble vote --fit`), by five-fold cross-validation.
A simulated row asks n systems; each is right with its own probability, a share of the rows is hard for all of them
together, and wrong answers are drawn from a few. Intervals are 95 % bootstraps over rows, paired for the differences.

    python -m benchmarks.vote_weights [POOL.jsonl ...] [--rows 1000] [--seed 0]

A POOL has lines of {"answer", "candidates": [{"system", "text"}]}; the numbers in the texts are counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ensemble_server.ensembles.voting.answer_extraction import extract
from ensemble_server.ensembles.voting.system_weights import AnsweredRow, accuracies, fitted_weights

CROWD = Path(__file__).parent.parent / "data" / "crowd"
NUM_FOLDS = 5
NUM_DRAWS = 10_000

# systems' accuracies; share of rows that are hard for all at once; how many wrong answers there are to choose from
SIMULATED: Mapping[str, tuple[Sequence[float], float, int]] = {
    "15 systems alike (.55 to .69), a quarter of rows hard for all, 20 wrong answers": (
        np.linspace(0.55, 0.69, 15),
        0.25,
        20,
    ),
    "15 systems alike (.55 to .69), half of the rows hard for all, 3 wrong answers": (
        np.linspace(0.55, 0.69, 15),
        0.5,
        3,
    ),
    "15 systems apart (.20 to .69), half of the rows hard for all, 3 wrong answers": (
        np.linspace(0.20, 0.69, 15),
        0.5,
        3,
    ),
    "4 systems apart (.25, .38, .41, .58), a quarter of rows hard for all, 20 wrong answers": (
        (0.25, 0.38, 0.41, 0.58),
        0.25,
        20,
    ),
    "4 systems apart (.25, .38, .41, .58), half of the rows hard for all, 3 wrong answers": (
        (0.25, 0.38, 0.41, 0.58),
        0.5,
        3,
    ),
}


def simulated(shares: Sequence[float], hard: float, num_wrong: int, num_rows: int, seed: int) -> list[AnsweredRow]:
    """Rows in which system k is right with probability shares[k]; in the `hard` share of rows with a third of it."""
    rng = np.random.default_rng(seed)
    is_hard = rng.random(num_rows) < hard
    scale = np.where(is_hard, 1 / 3, (1 - hard / 3) / (1 - hard) if hard else 1.0)  # the mean stays what it is
    rows = []
    for row in range(num_rows):
        answers = []
        for system, share in enumerate(shares):
            is_right = rng.random() < min(1.0, share * scale[row])
            answers.append((f"s{system}", "right" if is_right else f"wrong {rng.integers(num_wrong)}"))
        rows.append(AnsweredRow(answers, "right"))
    return rows


def recorded(path: Path) -> list[AnsweredRow]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = [(c["system"], extract(c["text"], "number")) for c in row["candidates"]]
        rows.append(AnsweredRow(answers, extract(str(row["answer"]), "number") or ""))
    return rows


def ways(rows: Sequence[AnsweredRow], seed: int) -> dict[str, np.ndarray]:
    """(n_rows,) of 0 and 1: whether each way is right in each row."""
    systems = list(accuracies(rows))
    fold = np.random.default_rng(seed).permutation(np.arange(len(rows)) % NUM_FOLDS)
    right: dict[str, np.ndarray] = {}
    for number in range(NUM_FOLDS):
        shares = accuracies([row for row, own in zip(rows, fold, strict=True) if own != number])
        ranked = sorted(shares, key=lambda system: -shares[system])
        weights = {
            "best system": {s: float(s == ranked[0]) for s in systems},
            "majority of all": dict.fromkeys(systems, 1.0),
            "majority of the best five": {s: float(s in ranked[:5]) for s in systems},
            "majority, fitted weights": fitted_weights(
                [row for row, own in zip(rows, fold, strict=True) if own != number]
            ),
        }
        for name, chosen in weights.items():
            place = right.setdefault(name, np.zeros(len(rows)))
            for index in np.flatnonzero(fold == number):
                place[index] = rows[index].is_won(chosen)
    return right


def table(title: str, rows: Sequence[AnsweredRow], seed: int) -> str:
    right = ways(rows, seed)
    draws = np.random.default_rng(seed).integers(len(rows), size=(NUM_DRAWS, len(rows)))
    lines = [f"### {title} ({len(rows)} rows)", "", "| way | right | over the best system |", "|---|---|---|"]
    for name, values in right.items():
        gain = values - right["best system"]
        low, high = np.percentile(gain[draws].mean(axis=1), [2.5, 97.5])
        shown = "" if name == "best system" else f"{gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {name} | {values.mean():.3f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pools", nargs="*", type=Path, default=[CROWD / "crowd_gsm8k_4sys.jsonl"])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for path in options.pools:
        print(table(path.stem, recorded(path), options.seed), end="\n\n")
    for title, (shares, hard, num_wrong) in SIMULATED.items():
        rows = simulated(shares, hard, num_wrong, options.rows, options.seed)
        print(table(f"simulated: {title}", rows, options.seed), end="\n\n")


if __name__ == "__main__":
    main()
