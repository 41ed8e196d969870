"""Tasks of lm-evaluation-harness, run by the harness itself over a model that is hosted in this process.

The harness reads its tasks, makes the prompts and judges the answers; `server.compare.measures.hosted_lm` answers it.
Text-level ensembles generate, but give no likelihoods. The data of a task must be on disk: nothing is downloaded.

Left out: chat templates of the harness (prompts are raw text, as its tasks write them) and its caches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.errors import ConfigError, EnsembleError
from ensemble_server.server.compare.measures.hosted_lm import Answers, Link, hosted_lm
from ensemble_server.server.compare.measures.task_measure import ItemScore
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

INSTALL = "lm-evaluation-harness is not installed: pip install 'ensemble-server[compare]'"


@dataclass(frozen=True)
class HarnessTask:
    """What the harness found. `metric`: "name,filter" of the figure that the items' scores are of.

    It is the task's first with a number per item. A task that has none (perplexities: their figure is one of all items
    together) has no `items`. `metrics`: all figures, so named. Items of a group's tasks have ids "task/number".
    """

    metric: str
    higher_is_better: bool
    items: tuple[ItemScore, ...]
    metrics: Mapping[str, float]


async def run_harness(
    hosting: Hosting,
    model_name: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    concurrency: int = 8,
    priority: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, HarnessTask]:
    """Run `tasks` (names, also of groups) on a model. `include_path`: a folder with task files of one's own.

    `on_progress` hears requests done and asked so far. A generation that fails is empty and its item has the error.
    Raises `ConfigError` for tasks that cannot be read, `UnsupportedError` if the model cannot give what they need.
    """
    link = Link(asyncio.get_running_loop(), asyncio.Semaphore(concurrency), on_progress)
    job = asyncio.ensure_future(
        in_own_thread(_evaluate, hosting, model_name, tasks, include_path, limit, num_fewshot, seed, priority, link)
    )
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        link.cancel()
        await asyncio.wait([job])
        job.exception()  # only says that it was cancelled
        raise


def _evaluate(
    hosting: Hosting,
    model_name: str,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    seed: int,
    priority: int,
    link: Link,
) -> dict[str, HarnessTask]:
    try:
        import lm_eval
    except ImportError as exc:
        raise ConfigError(INSTALL) from exc
    answers = Answers(hosting, model_name, seed, priority)
    manager = _task_manager(tasks, include_path)
    evaluate: Any = lm_eval.simple_evaluate  # a decorator of the harness hides its parameters
    try:
        results = evaluate(
            model=hosted_lm(answers, link),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,  # intervals are paired, and made elsewhere
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except EnsembleError:
        raise
    except Exception as exc:  # tasks are programs: they raise whatever their data and their filters make them
        raise ConfigError(
            f"lm-evaluation-harness failed on {', '.join(tasks)} ({type(exc).__name__}: {exc}); the data of its tasks "
            "must be on disk"
        ) from exc
    return {task: _as_task(task, results, answers.errors) for task in tasks}


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """The harness's own tasks are looked at only if one is wanted: there are thousands."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"lm-evaluation-harness has no task {task!r}{nearest(task, manager.all_tasks)}")
    return manager


# --- the harness's results as ours -----------------------------------------------------------------------------------


def _as_task(name: str, results: Mapping[str, Any], errors: Mapping[tuple[str, int], str]) -> HarnessTask:
    subtasks = _leaves(name, results.get("group_subtasks", {}))
    metric, metric_filter, has_items = _main_metric(subtasks[0], results)
    if any(_main_metric(subtask, results) != (metric, metric_filter, has_items) for subtask in subtasks):
        raise ConfigError(f"the tasks of the group {name!r} have different metrics; name them one by one")
    items = [
        _item(sample, metric, "" if subtask == name else f"{subtask}/", errors.get((subtask, sample["doc_id"])))
        for subtask in subtasks
        for sample in (results["samples"][subtask] if has_items else ())
        if sample["filter"] == metric_filter
    ]
    figures = results["results"].get(name) or results["results"][subtasks[0]]
    return HarnessTask(
        f"{metric},{metric_filter}",
        bool(results["higher_is_better"][subtasks[0]].get(metric, True)),
        tuple(items),
        {key: float(value) for key, value in figures.items() if _is_figure(key, value)},
    )


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, through all its levels; of a task, itself."""
    children = groups.get(name)
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [name]


def _main_metric(task: str, results: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Name and filter of the first metric with a number per item; if there is none, of the first. -> (..., is there)"""
    samples = results["samples"][task]
    names = [key.partition(",") for key, value in results["results"][task].items() if _is_figure(key, value)]
    for metric, _, metric_filter in names:
        values = [sample.get(metric) for sample in samples if sample["filter"] == metric_filter]
        if values and all(isinstance(value, int | float) for value in values):
            return metric, metric_filter, True
    if not names:
        raise ConfigError(f"the task {task!r} gave no figure")
    return names[0][0], names[0][2], False


def _is_figure(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)


def _item(sample: Mapping[str, Any], metric: str, prefix: str, error: str | None) -> ItemScore:
    outputs = sample["filtered_resps"]
    score = 0.0 if error is not None else float(sample[metric])
    return ItemScore(
        f"{prefix}{sample['doc_id']}",
        score,
        tuple(output if isinstance(output, str) else json.dumps(output) for output in outputs),
        (None,) * len(outputs),
        (score,),
        str(sample["target"]),
        sample["prompt_hash"],
        error=error,
    )
