"""The table of a batch's samples and of votes on them, from files that say what is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(custom_id: str, model: str, *texts: str) -> dict:
    choices = [{"index": index, "message": {"content": text}} for index, text in enumerate(texts)]
    body = {"model": model, "choices": choices}
    return {"custom_id": custom_id, "cell": {"model": model}, "response": {"status_code": 200, "body": body}}


def test_samples_votes_and_failed_rows_are_counted(tmp_path):
    questions = write(tmp_path / "questions.jsonl", [{"id": "a", "answer": "4"}, {"id": "b", "answer": "9"}])
    samples = write(
        tmp_path / "samples.jsonl",
        [
            answered("a", "red", "It is 4.", "It is 5."),
            answered("b", "red", "The answer is 9", "9"),
            answered("a", "blue", "It is 1.", "Two."),
            {"custom_id": "b", "cell": {"model": "blue"}, "response": None},
        ],
    )
    voted = write(tmp_path / "majority.jsonl", [{"id": "a", "text": "So 4."}, {"id": "b", "text": "So 8."}])
    table = subprocess.run(
        [sys.executable, ROOT / "examples" / "score_answers.py", questions, samples, voted],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert "| a sample of red | 0.75 |" in table
    assert "| a sample of blue | 0.00 | [0.00, 0.66] |" in table, "none of two questions right: Wilson's upper bound"
    assert "| majority | 0.50 | [0.09, 0.91] |" in table
