"""The rows of `benchmarks.batch`: word problems behind eight worked examples, as people prompt for GSM8K.

Eight of the 200 GSM8K questions are the examples; the other 192 and then SVAMP's are asked. A `salt` in the first line
makes a prompt whose beginning nobody has read: each timed run pays for its prefix once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NUM_SHOTS = 8
_TASKS = Path(__file__).parent.parent / "data" / "tasks"


def prompts(num_rows: int, salt: str) -> list[str]:
    """`num_rows` distinct prompts with one beginning of about 1400 tokens."""
    gsm8k, svamp = _read("gsm8k_test_200.jsonl"), _read("svamp_150.jsonl")
    shots = "\n\n".join(f"Q: {row['question']}\nA: {_worked(row)}" for row in gsm8k[:NUM_SHOTS])
    questions = [row["question"] for row in (*gsm8k[NUM_SHOTS:], *svamp)]
    if num_rows > len(questions):
        raise SystemExit(f"there are {len(questions)} questions, --rows asks for {num_rows}")
    return [f"Word problems, set {salt}.\n\n{shots}\n\nQ: {question}\nA:" for question in questions[:num_rows]]


def chat_body(model: str, prompt: str, num_tokens: int) -> dict[str, Any]:
    """Greedy, and exactly `num_tokens` long, so that all arms do the same work."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def _worked(row: dict[str, str]) -> str:
    """The reasoning without its calculator marks, and the answer: "3 * 7 = <<3*7=21>>21" -> "3 * 7 = 21"."""
    return f"{re.sub(r'<<.*?>>', '', row['rationale'])} The answer is {row['answer']}."


def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (_TASKS / name).read_text(encoding="utf-8").splitlines()]
