"""How right are the samples of a batch job, and the answers that votes made of them? Accuracy with 95% intervals.

    python examples/score_answers.py QUESTIONS.jsonl SAMPLES.jsonl [VOTED.jsonl ...]

QUESTIONS: {"id", "answer"} a line. SAMPLES: the output of `ensemble batch`. VOTED: outputs of `ensemble vote`. Answers
are numbers, found in the texts as votes find them. Samples are averaged within a question, and questions are resampled.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.proportions import wilson
from ensemble_server.ensembles.voting.answer_extraction import extract, same_answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("questions", "samples"):
        parser.add_argument(name, type=Path)
    parser.add_argument("voted", type=Path, nargs="*")
    files = parser.parse_args()
    answers = {row["id"]: row["answer"] for row in lines(files.questions)}

    print("| answers | right | 95% interval |\n|---|---|---|")
    for model, scores in sample_scores(files.samples, answers).items():
        estimate = bootstrap.mean(np.array(scores))
        # Resampled zeros are zeros: then the interval is that of a question, which says less and is right.
        is_flat = estimate.value in (0, 1)
        interval = wilson(int(estimate.value) * len(scores), len(scores)) if is_flat else estimate.interval
        show(f"a sample of {model}", estimate.value, interval)
    for path in files.voted:
        num_right = sum(is_right(row["text"], answers[row["id"]]) for row in lines(path))
        show(path.stem, num_right / len(answers), wilson(num_right, len(answers)))


def lines(path: Path) -> Iterator[dict]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def sample_scores(path: Path, answers: dict[str, str]) -> dict[str, list[float]]:
    """Model -> one number per question: the share of its samples that are right, 0 for a row that failed.

    A failed row names no model where the job had only one.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    rows = list(lines(path))
    bodies = [(row["response"] or {}).get("body", {}) for row in rows]
    only = next((body["model"] for body in bodies if "model" in body), "no model")
    for row, body in zip(rows, bodies, strict=True):
        texts = [choice["message"]["content"] or "" for choice in body.get("choices", [])]
        right = [is_right(text, answers[row["custom_id"]]) for text in texts]
        model = row.get("cell", {}).get("model") or body.get("model", only)
        scores[model].append(sum(right) / len(right) if right else 0.0)
    return scores


def is_right(text: str, answer: str) -> bool:
    found = extract(text, "number")
    return found is not None and same_answer(found, answer, "number")


def show(name: str, value: float, interval: object) -> None:
    shown = "one question: none" if interval is None else f"[{interval.low:.2f}, {interval.high:.2f}]"
    print(f"| {name} | {value:.2f} | {shown} |")


if __name__ == "__main__":
    main()
