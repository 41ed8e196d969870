"""Quality that the vote reaches on recorded answers: each similarity and blend against the systems that it votes over.

A pool has several systems' answers to each prompt, with a quality for each. Compared are: a random system (the mean of
all), the best single system (named after the fact, on the same prompts), the oracle (the best answer to each prompt),
and the answer that each vote elects. An elected text counts with the mean quality of the candidates that equal it.
Intervals are 95 % percentile bootstraps over prompts, paired: both sides of a difference are taken on the same draws.
Of pools whose rows have an `answer`, the majority of the numbers in the texts is compared too.

    python -m benchmarks.vote_quality [POOL.jsonl ...] [--draws 10000] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from ensemble_server.ensembles.crowd_vote import count, hold_vote
from ensemble_server.ensembles.voting.answer_extraction import extract
from ensemble_server.ensembles.voting.majority import plurality
from ensemble_server.server.weights.embeddings import SentenceEmbedder

CROWD = Path(__file__).parent.parent / "data" / "crowd"
POOLS = [CROWD / "crowd_gsm8k_4sys.jsonl", CROWD / "crowd_llm_vicuna.jsonl"]
SINGLES = ("rouge_l_word", "rouge_l_word_precision", "rouge_l_word_recall", "rouge_l_char", "embedding")
BLENDS: dict[str, dict[str, float]] = {name: {name: 1.0} for name in SINGLES} | {
    "embedding + rouge_l_word": {"embedding": 1.0, "rouge_l_word": 1.0},
    "embedding + rouge_l_char": {"embedding": 1.0, "rouge_l_char": 1.0},
    "embedding + rouge_l_word + rouge_l_char": {"embedding": 1.0, "rouge_l_word": 1.0, "rouge_l_char": 1.0},
}


@dataclass(frozen=True)
class Arm:
    """A way to choose: its mean quality, and its differences from a random and from the best system, with intervals."""

    name: str
    mean: float
    interval: tuple[float, float]
    over_random: tuple[float, float, float]  # difference, and its interval
    over_best: tuple[float, float, float]


async def chosen_quality(pool: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """(n_prompts,) quality of what each way chooses, by its name."""
    embedder = SentenceEmbedder("all-MiniLM-L6-v2")
    ways: dict[str, list[float]] = {}
    for row in pool:
        texts = [candidate["text"] for candidate in row["candidates"]]
        quality = np.array([candidate["quality"] for candidate in row["candidates"]])
        worth = {text: quality[[other == text for other in texts]].mean() for text in texts}
        full = await hold_vote(texts, dict.fromkeys(SINGLES, 1.0), embedder=embedder)
        choices = {name: count(texts, full.matrices, weights).consensus.winner for name, weights in BLENDS.items()}
        if "answer" in row:
            answers = [extract(text, "number") for text in texts]
            winner = plurality(answers, [1.0] * len(texts))
            choices["majority of numbers"] = answers.index(winner)
        ways.setdefault("random system", []).append(quality.mean())
        for name, index in choices.items():
            ways.setdefault(name, []).append(worth[texts[index]])
        ways.setdefault("oracle", []).append(quality.max())
    return {name: np.array(values) for name, values in ways.items()}


def best_system(pool: Sequence[Mapping[str, Any]]) -> tuple[str, np.ndarray]:
    """The system of the highest mean quality, and its (n_prompts,) quality."""
    by_system: dict[str, list[float]] = {}
    for row in pool:
        for candidate in row["candidates"]:
            by_system.setdefault(candidate["system"], []).append(candidate["quality"])
    name = max(by_system, key=lambda system: np.mean(by_system[system]))
    return name, np.array(by_system[name])


def compare(pool: Sequence[Mapping[str, Any]], *, num_draws: int, seed: int) -> list[Arm]:
    name, best = best_system(pool)
    qualities = asyncio.run(chosen_quality(pool))
    ways = {"random system": qualities.pop("random system"), f"best system ({name})": best} | qualities
    draws = np.random.default_rng(seed).integers(len(pool), size=(num_draws, len(pool)))

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        return float(low), float(high)

    def difference(values: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
        return float((values - base).mean()), *interval(values - base)

    return [
        Arm(
            way,
            float(values.mean()),
            interval(values),
            difference(values, ways["random system"]),
            difference(values, best),
        )
        for way, values in ways.items()
    ]


def table(title: str, arms: Sequence[Arm]) -> str:
    lines = [
        f"### {title}",
        "",
        "| way | mean quality | 95 % interval | over a random system | over the best system |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        random, best = (f"{d:+.3f} [{low:+.3f}, {high:+.3f}]" for d, low, high in (arm.over_random, arm.over_best))
        lines.append(
            f"| {arm.name} | {arm.mean:.3f} | [{arm.interval[0]:.3f}, {arm.interval[1]:.3f}] | {random} | {best} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pools", nargs="*", type=Path, default=POOLS)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for path in options.pools:
        pool = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        arms = compare(pool, num_draws=options.draws, seed=options.seed)
        results[path.stem] = [vars(arm) for arm in arms]
        print(table(f"{path.stem}: {len(pool)} prompts, {len(pool[0]['candidates'])} systems", arms), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
