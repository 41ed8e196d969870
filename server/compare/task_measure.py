"""How well a model does a task: rows of a JSONL file, a template that makes the prompt, a metric that judges.

Item by item, so that models can be compared on the same items, and failures are counted where they happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from server.hosting import Hosting

Metric = Literal[
    "exact_match", "number", "choice", "yes_no", "multiple_choice", "multiple_choice_per_byte", "rouge_l", "chrf"
]


@dataclass(frozen=True)
class Item:
    """One row of a task, ready to be asked. `choices`: options of a multiple choice by likelihood."""

    id: str
    prompt: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items and how they are asked and judged.

    `is_chat`: the prompt is a user message; else raw text that the model continues. `num_samples` answers per item,
    each with a seed of its own; `max_tokens`, `temperature`, `stop` as in a request.
    """

    name: str
    items: tuple[Item, ...]
    metric: Metric
    is_chat: bool = True
    system_prompt: str | None = None
    num_samples: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ItemScore:
    """How one item went. `score`: mean over its samples, from 0 to 1; a failed item has 0 and its `error`.

    `outputs`, `answers` (what was extracted; None where nothing was found), `sample_scores`: one per sample.
    """

    id: str
    score: float
    outputs: tuple[str, ...]
    answers: tuple[str | None, ...]
    sample_scores: tuple[float, ...]
    reference: str
    prompt_sha256: str
    completion_tokens: int = 0
    error: str | None = None


def read_task(
    name: str, data: Path, *, metric: Metric, template: str, answer: str = "{{ answer }}", **settings: Any
) -> Task:
    """The task in a JSONL file: `template` and `answer` are Jinja over each row's fields. Raises `ConfigError`."""
    raise NotImplementedError


async def measure_task(
    hosting: Hosting,
    model_name: str,
    task: Task,
    *,
    seed: int = 0,
    concurrency: int = 8,
    priority: int = 1,
    overrides: Mapping[str, Any] | None = None,
    on_item: Callable[[ItemScore], None] | None = None,
) -> list[ItemScore]:
    """Every item of `task` asked of a model, in the task's order. Raises `UnsupportedError` if it cannot be asked."""
    raise NotImplementedError


def pass_at_k(scores: Sequence[ItemScore], k: int) -> float:
    """Mean over items of the unbiased estimate; a sample is right if its score is 1."""
    raise NotImplementedError
