"""Batch generation: rows in, answers out, nothing lost. `run_batch` is the whole of it in one call.

from ensemble_server.server.batch import run_batch

answers = run_batch("config.yaml", ["What is 2 + 2?", "And 3?"], "answers.jsonl", model="trio", max_tokens=64)
for text in answers.texts():
    print(text)
"""

from __future__ import annotations

from ensemble_server.server.batch.job.rows import URLS, BadRow, Row, RowResult, Url
from ensemble_server.server.batch.notebook import Answers, run_batch, run_batch_async

__all__ = ["URLS", "Answers", "BadRow", "Row", "RowResult", "Url", "run_batch", "run_batch_async"]
