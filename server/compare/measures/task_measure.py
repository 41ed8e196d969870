"""How well a model does a task: every item asked, judged, and counted where it went wrong.

Item by item, so that models can be compared on the same items. `task_files` reads tasks, `task_metrics` judges outputs,
`choice_likelihood` scores options.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ensemble_server.ensembles.base import Answer, GenerationRequest, Message, Model, Sampling, collect
from ensemble_server.ensembles.comparison import pass_at_k as single_item
from ensemble_server.ensembles.errors import EngineDeadError, EnsembleError, OverloadedError, UnsupportedError
from ensemble_server.ensembles.text_level import derived_seed
from ensemble_server.server.compare.measures.choice_likelihood import option_logprobs
from ensemble_server.server.compare.measures.task_metrics import GenerationMetric, judge

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

ChoiceMetric = Literal["multiple_choice", "multiple_choice_per_byte"]
Metric = GenerationMetric | ChoiceMetric
CHOICE_METRICS: tuple[Literal["multiple_choice"], Literal["multiple_choice_per_byte"]] = get_args(ChoiceMetric)

MAX_TRIES = 10  # of a request that finds the queue full


@dataclass(frozen=True)
class Item:
    """One row of a task, ready to be asked. `choices`: options of a multiple choice; `references` is the right one."""

    id: str
    prompt: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items and how they are asked and judged.

    `is_chat`: the prompt is a user's message; else raw text that the model continues. `num_samples` answers per item,
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

    def prompt_of(self, item: Item) -> str | tuple[Message, ...]:
        """What the model is given: raw text, or the messages of a chat."""
        if not self.is_chat:
            return item.prompt if self.system_prompt is None else f"{self.system_prompt}\n\n{item.prompt}"
        system = () if self.system_prompt is None else ({"role": "system", "content": self.system_prompt},)
        return (*system, {"role": "user", "content": item.prompt})


@dataclass(frozen=True)
class ItemScore:
    """How one item went. `score`: mean of `sample_scores`, from 0 to 1.

    `outputs`, `answers` (None where none was found) and `sample_scores` have one entry per sample. A sample that failed
    has an empty output and the score 0, and `error` says why (of the first that did). Of a multiple choice the output
    is JSON of the options' log-probabilities, in nats. `prompt_sha256`: of what the model was given.
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
    """Every item of `task` asked of a model, in the task's order; `concurrency` items at a time.

    The seed of a sample follows from `seed`, the item's id and the sample's number. An item that fails is scored 0,
    with its error. Raises `UnsupportedError` if the model cannot be asked in this way at all, `EngineDeadError` if
    nothing can be asked any more. Cancelling it cancels what is running.
    """
    model = hosting.models[model_name]
    places = asyncio.Semaphore(concurrency)

    async def sample(item: Item, number: int) -> Sample:
        try:
            if task.metric in CHOICE_METRICS:
                return await _choose(hosting, model_name, task, item, priority)
            request = _request(task, item, derived_seed(seed, item.id, number), priority, overrides or {})
            answer = await _patiently(model, request)
        except (UnsupportedError, EngineDeadError):
            raise
        except EnsembleError as exc:
            return Sample("", None, 0.0, 0, str(exc))
        found, score = judge(task.metric, answer.text, item.references)
        return Sample(answer.text, found, score, answer.done.usage.completion_tokens)

    async def measure(item: Item) -> ItemScore:
        async with places:
            scored = item_score(task, item, [await sample(item, number) for number in range(task.num_samples)])
        if on_item is not None:
            on_item(scored)
        return scored

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(measure(item)) for item in task.items]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one is enough: they fail for one reason
    return [measured.result() for measured in running]


def pass_at_k(scores: Sequence[ItemScore], k: int) -> float:
    """Mean over items of the unbiased estimate of pass@k; a sample is right if its score is 1."""
    return float(
        np.mean([single_item.pass_at_k(len(item.sample_scores), item.sample_scores.count(1.0), k) for item in scores])
    )


@dataclass(frozen=True)
class Sample:
    """One answer to an item, judged. `error`: why there is none."""

    output: str
    answer: str | None
    score: float
    completion_tokens: int
    error: str | None = None


def _request(
    task: Task, item: Item, seed: int | None, priority: int, overrides: Mapping[str, Any]
) -> GenerationRequest:
    prompt = task.prompt_of(item)
    sampling = Sampling(max_tokens=task.max_tokens, temperature=task.temperature, stop=task.stop, seed=seed)
    return GenerationRequest(
        messages=None if isinstance(prompt, str) else prompt,
        prompt=prompt if isinstance(prompt, str) else None,
        sampling=sampling,
        priority=priority,
        overrides=overrides,
    )


async def _patiently(model: Model, request: GenerationRequest) -> Answer:
    """The answer, asked for again while the queue is full."""
    for _ in range(MAX_TRIES - 1):
        try:
            return await collect(model, request)
        except OverloadedError as exc:
            await asyncio.sleep(exc.retry_after_s)
    return await collect(model, request)


async def _choose(hosting: Hosting, model_name: str, task: Task, item: Item, priority: int) -> Sample:
    nats = await option_logprobs(hosting, model_name, task.prompt_of(item), item.choices, priority=priority)
    if np.isnan(nats).any():
        return Sample("", None, 0.0, 0, "the options have probabilities that are no numbers (NaN)")
    sizes = [len(choice.encode()) if task.metric == "multiple_choice_per_byte" else 1 for choice in item.choices]
    best = int(np.argmax(np.array(nats) / sizes))
    answer = item.choices[best]
    return Sample(json.dumps(dict(zip(item.choices, nats, strict=True))), answer, float(answer in item.references), 0)


def item_score(task: Task, item: Item, samples: Sequence[Sample]) -> ItemScore:
    """How an item went, from at least one sample of it."""
    given = json.dumps([task.prompt_of(item), item.choices], ensure_ascii=False)
    return ItemScore(
        item.id,
        float(np.mean([sample.score for sample in samples])),
        tuple(sample.output for sample in samples),
        tuple(sample.answer for sample in samples),
        tuple(sample.score for sample in samples),
        item.references[0],
        hashlib.sha256(given.encode()).hexdigest(),
        sum(sample.completion_tokens for sample in samples),
        next((sample.error for sample in samples if sample.error is not None), None),
    )
