"""Speed of the vote's similarities against the pairwise way that people write, on 8 candidates of 800 characters.

The pairwise way takes each unordered pair once: a dynamic programming table in pure Python for characters, the
`rouge-score` package for words. For embeddings it encodes texts one at a time: each text once (`alone`), or both texts
of each pair anew (`per pair`). All arms run in every repeat, in a new order each time; ratios are taken within a
repeat, so that a busy machine slows both sides. Results are checked to be equal first.

    python -m benchmarks.vote [--repeats 5] [--candidates 8] [--characters 800] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from ensemble_server.ensembles.voting.similarity import characters, cosine_similarity, rouge_l
from ensemble_server.server.weights.embeddings import SentenceEmbedder

LEAST_SECONDS = 0.5  # that an arm is timed for; fast ones are called many times
ANSWERS = Path(__file__).parent.parent / "data" / "crowd" / "crowd_llm_vicuna.jsonl"


def long_answers(num_candidates: int, num_characters: int) -> list[str]:
    """The first recorded answers that are long enough, cut to one length."""
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    texts = [candidate["text"] for row in rows for candidate in row["candidates"]]
    return [text[:num_characters] for text in texts if len(text) >= num_characters][:num_candidates]


def table_lcs(left: str, right: str) -> int:
    """The textbook's dynamic programming, one row at a time."""
    row = [0] * (len(right) + 1)
    for a in left:
        previous = 0
        for index, b in enumerate(right, start=1):
            above = row[index]
            row[index] = previous + 1 if a == b else max(above, row[index - 1])
            previous = above
    return row[-1]


def pairwise(texts: list[str], similarity: Callable[[str, str], float]) -> np.ndarray:
    matrix = np.eye(len(texts))
    for i, j in combinations(range(len(texts)), 2):
        matrix[i, j] = matrix[j, i] = similarity(texts[i], texts[j])
    return matrix


def table_rouge(left: str, right: str) -> float:
    left, right = characters(left), characters(right)
    return 2 * table_lcs(left, right) / (len(left) + len(right))


def arms(texts: list[str]) -> dict[str, dict[str, Callable[[], np.ndarray]]]:
    """For each similarity: ours, and the ways it is compared with. All give the same matrix."""
    package = RougeScorer(["rougeL"], use_stemmer=False)
    embedder = SentenceEmbedder("all-MiniLM-L6-v2")

    def embed(batch: list[str]) -> np.ndarray:
        return asyncio.run(embedder.embed(batch))

    def cosine_of_pair(left: str, right: str) -> float:
        return float(embed([left])[0] @ embed([right])[0])

    return {
        "rouge_l_char": {
            "ours": lambda: rouge_l("rouge_l_char", texts),
            "pairwise table": lambda: pairwise(texts, table_rouge),
        },
        "rouge_l_word": {
            "ours": lambda: rouge_l("rouge_l_word", texts),
            "rouge-score": lambda: pairwise(texts, lambda left, right: package.score(right, left)["rougeL"].fmeasure),
        },
        "embedding": {
            "ours": lambda: cosine_similarity(texts, embed(texts)),
            "alone": lambda: cosine_similarity(texts, np.concatenate([embed([text]) for text in texts])),
            "per pair": lambda: pairwise(texts, cosine_of_pair),
        },
    }


def seconds_per_call(run: Callable[[], object], num_calls: int) -> float:
    started = time.perf_counter()
    for _ in range(num_calls):
        run()
    return (time.perf_counter() - started) / num_calls


def measure(repeats: int, num_candidates: int, num_characters: int) -> list[dict[str, object]]:
    texts = long_answers(num_candidates, num_characters)
    rows: list[dict[str, object]] = []
    for name, ways in arms(texts).items():
        matrices = {way: run() for way, run in ways.items()}  # warms up, too
        for way, matrix in matrices.items():
            assert np.allclose(matrix, matrices["ours"], atol=1e-5), f"{name}: {way} differs"
        num_calls = {way: max(1, round(LEAST_SECONDS / seconds_per_call(run, 1))) for way, run in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats):
            order = list(ways)
            random.Random(repeat).shuffle(order)
            for way in order:
                seconds[way].append(seconds_per_call(ways[way], num_calls[way]))
        for way in ways:
            ratios = [theirs / ours for theirs, ours in zip(seconds[way], seconds["ours"], strict=True)]
            rows.append(
                {
                    "similarity": name,
                    "way": way,
                    "median_ms": 1000 * statistics.median(seconds[way]),
                    "times_ours": statistics.median(ratios),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--characters", type=int, default=800)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.repeats, options.candidates, options.characters)
    print(f"{options.candidates} candidates x {options.characters} characters, median of {options.repeats}")
    for row in rows:
        print(f"{row['similarity']:14} {row['way']:16} {row['median_ms']:10.2f} ms {row['times_ours']:9.1f} x ours")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
