"""Everything that is measured of a group of arms which are loaded together; each figure is on disk once it is there.

A measure that fails ends with the arm's record saying so, and the other arms go on. Arms that cannot be loaded together
are loaded in halves, until it is known which one is at fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.errors import EngineDeadError, UnsupportedError
from ensemble_server.server.compare.arms.candidates import ArmModel
from ensemble_server.server.compare.arms.footprint import clusters, footprint, is_priced
from ensemble_server.server.compare.kept.records import ItemRecord, TaskRecord, TextRecord, inputs_hash
from ensemble_server.server.compare.measures.cost import CHARS_PER_TOKEN, ForwardCounter, as_record, measure_cost
from ensemble_server.server.compare.measures.task_measure import ItemScore, measure_task
from ensemble_server.server.compare.measures.text_measure import NotScored, TextScores, measure_text
from ensemble_server.server.compare.planning.sources import sha256_of
from ensemble_server.server.compare.running.views import collect_views
from ensemble_server.server.compare.running.work import Work, task_sha256
from ensemble_server.server.config.blocks import Config, RemoteModel
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.hosting import Hosting

if TYPE_CHECKING:
    from ensemble_server.server.compare.measures.harness import HarnessTask


async def measure_group(work: Work, config: Config, arms: Sequence[ArmModel]) -> None:
    """Load the arms together and measure what is missing of them. Raises nothing that is the fault of an arm."""
    arms = [arm for arm in arms if work.record(arm).failure is None and work.is_pending(arm)]
    if not arms:
        return
    counter = ForwardCounter()
    work.listener.stage(f"loading {', '.join(arm.arm for arm in arms)}")
    async with AsyncExitStack() as stack:
        try:
            part = excerpt(config, [arm.model for arm in arms])
            hosting = await stack.enter_async_context(Hosting.open(part, on_step=counter))
        except Exception as exc:
            if len(arms) == 1:
                work.fail(arms, "load", exc)
                return
            halves = [arms[: len(arms) // 2], arms[len(arms) // 2 :]]
        else:
            try:
                await _measure_loaded(work, config, hosting, arms, counter)
                return
            except EngineDeadError:
                halves = [arms]  # whoever it happened to has failed; the others go on with a new engine
    for half in halves:
        await measure_group(work, config, half)


async def _measure_loaded(
    work: Work, config: Config, hosting: Hosting, arms: Sequence[ArmModel], counter: ForwardCounter
) -> None:
    for cluster in clusters(config, arms):
        for name in work.texts:
            await _measure_text(work, hosting, name, [arm for arm in cluster if name in work.pending_texts(arm)])
            for arm in cluster:
                if name in work.pending_null_texts(arm):
                    await _measure_text(work, hosting, name, [arm], is_null_check=True)
    for arm in arms:
        await _measure_tasks(work, hosting, arm)
    for arm in arms:
        if work.record(arm).failure is None:
            await collect_views(work, hosting, arm)
    alive = [arm for arm in arms if work.record(arm).failure is None and work.is_cost_pending(arm)]
    if alive:
        await _measure_cost(work, config, hosting, alive, counter)


async def _measure_text(
    work: Work, hosting: Hosting, name: str, arms: Sequence[ArmModel], *, is_null_check: bool = False
) -> None:
    arms = [arm for arm in arms if work.record(arm).failure is None]
    if not arms:
        return
    listed = ", ".join(arm.arm for arm in arms)
    work.listener.stage(f"text {name}: {listed}" + (" (null check)" if is_null_check else ""))
    documents = work.texts[name]
    try:
        scores = await measure_text(
            hosting,
            {arm.arm: arm.model for arm in arms},
            documents,
            window=work.plan.file.window,
            stride=work.plan.file.stride,
            shift=work.null_shift if is_null_check else 0,
            on_progress=work.listener.progress,
        )
    except EngineDeadError as exc:
        work.fail(arms, f"text {name}", exc)
        raise
    except Exception as exc:
        if len(arms) == 1:
            work.fail(arms, f"text {name}", exc)
            return
        for arm in arms:  # alone, to know whose fault it was
            await _measure_text(work, hosting, name, [arm])
        return
    for arm in arms:
        record = work.record(arm)
        inputs = (work.null_text_inputs if is_null_check else work.text_inputs)(arm, name)
        place = record.null_text if is_null_check else record.text
        place[name] = text_record_of(scores[arm.arm], inputs, sha256_of(documents))
        work.records.save(record)


def text_record_of(scores: TextScores | NotScored, inputs: str, items_sha256: str) -> TextRecord:
    """What is kept of a text under one model: its figures, or why there are none. All that is kept is finite."""
    if isinstance(scores, NotScored):
        return TextRecord(inputs=inputs, items_sha256=items_sha256, skipped=scores.reason)
    if (reason := _no_figure(scores)) is not None:
        return TextRecord(inputs=inputs, items_sha256=items_sha256, skipped=reason)
    return TextRecord(
        inputs=inputs,
        items_sha256=items_sha256,
        nats=scores.nats.tolist(),
        num_bytes=scores.num_bytes.tolist(),
        num_tokens=scores.num_tokens.tolist(),
    )


def _no_figure(scores: TextScores) -> str | None:
    """Why nothing can be computed from what a text was given; None if it can."""
    if not scores.num_tokens.sum():
        return "there is no token to predict: a text of one token, or too short for all members to expect anything"
    if np.isnan(scores.nats).any():
        return f"document {int(np.isnan(scores.nats).argmax())} has a token whose probability is no number (NaN)"
    if np.isinf(scores.nats).any():
        return f"document {int(np.isinf(scores.nats).argmax())} has a token of probability 0: infinitely many bits"
    return None


async def _measure_tasks(work: Work, hosting: Hosting, arm: ArmModel) -> None:
    record = work.record(arm)
    runs = [(record.tasks, name, work.seed) for name in work.pending_tasks(arm)]
    runs += [(record.null_tasks, name, work.null_seed) for name in work.pending_null_tasks(arm)]
    for place, name, seed in runs:
        if record.failure is not None:
            return
        work.listener.stage(f"task {name}: {arm.arm}" + ("" if place is record.tasks else " (null check)"))
        try:
            place[name] = await run_task(work, hosting, arm.model, name, seed, work.task_inputs(arm, name, seed=seed))
        except EngineDeadError as exc:
            work.fail([arm], f"task {name}", exc)
            raise
        except Exception as exc:
            work.fail([arm], f"task {name}", exc)
            return
        work.records.save(record)
    if work.is_harness_pending(arm):
        await _measure_harness(work, hosting, arm)


async def run_task(work: Work, hosting: Hosting, model: str, name: str, seed: int, inputs: str) -> TaskRecord:
    """A task under one model, as it is recorded. Items that fail are in it; raises what ends the whole task."""
    task = work.tasks[name]
    num_done = 0

    def count(_: ItemScore) -> None:
        nonlocal num_done
        num_done += 1
        work.listener.progress(num_done, len(task.items))

    items_sha256 = task_sha256(task)
    try:
        scores = await measure_task(hosting, model, task, seed=seed, on_item=count)
    except UnsupportedError as exc:
        return TaskRecord(inputs=inputs, items_sha256=items_sha256, metric=task.metric, skipped=str(exc))
    return TaskRecord(
        inputs=inputs, items_sha256=items_sha256, metric=task.metric, items=[item_record(item) for item in scores]
    )


def item_record(item: ItemScore) -> ItemRecord:
    return ItemRecord(
        id=item.id,
        score=item.score,
        outputs=list(item.outputs),
        answers=list(item.answers),
        sample_scores=list(item.sample_scores),
        reference=item.reference,
        prompt_sha256=item.prompt_sha256,
        completion_tokens=item.completion_tokens,
        error=item.error,
    )


async def _measure_harness(work: Work, hosting: Hosting, arm: ArmModel) -> None:
    from ensemble_server.server.compare.measures.harness import run_harness

    spec = work.plan.file.lm_eval
    assert spec is not None, "only asked where there are such tasks"
    record, inputs = work.record(arm), work.harness_inputs(arm)
    work.listener.stage(f"lm_eval {', '.join(spec.tasks)}: {arm.arm}")
    try:
        found = await run_harness(
            hosting,
            arm.model,
            spec.tasks,
            include_path=None if spec.include_path is None else Path(spec.include_path),
            limit=spec.limit,
            num_fewshot=spec.num_fewshot,
            seed=work.seed,
            on_progress=work.listener.progress,
        )
    except UnsupportedError as exc:
        for name in spec.tasks:
            record.tasks[name] = TaskRecord(inputs=inputs, items_sha256="", metric="", skipped=str(exc))
    except EngineDeadError as exc:
        work.fail([arm], "lm_eval", exc)
        raise
    except Exception as exc:
        work.fail([arm], "lm_eval", exc)
        return
    else:
        for name, task in found.items():
            record.tasks[name] = _harness_record(task, inputs)
    work.records.save(record)


def _harness_record(task: HarnessTask, inputs: str) -> TaskRecord:
    """The items are those of the harness; their hash is that of what they asked."""
    skipped = None
    if not task.items:
        skipped = f"the harness gives one figure for all items together: {json.dumps(dict(task.metrics))}"
    elif not all(math.isfinite(item.score) for item in task.items):
        skipped = f"{task.metric} is no finite number on some items"
    elif not task.higher_is_better and any(item.error is not None for item in task.items):
        skipped = f"{task.metric} is better low, so that failed items cannot count as wrong"
    return TaskRecord(
        inputs=inputs,
        items_sha256=inputs_hash({"items": [[item.id, item.prompt_sha256, item.reference] for item in task.items]}),
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        items=[] if skipped is not None else [item_record(item) for item in task.items],
        skipped=skipped,
    )


async def _measure_cost(
    work: Work, config: Config, hosting: Hosting, arms: Sequence[ArmModel], counter: ForwardCounter
) -> None:
    work.listener.stage(f"cost, in turns: {', '.join(arm.arm for arm in arms)}")
    settings = work.plan.file.cost
    measured = await measure_cost(
        {arm.arm: hosting.models[arm.model] for arm in arms},
        settings,
        _prompt_text(work),
        counter,
        _token_counter(hosting, arms),
        is_chat=_all_chat(hosting, arms),
        remote=[name for name, entry in config.models.items() if isinstance(entry, RemoteModel)],
        on_round=work.listener.progress,
    )
    for arm in arms:
        record = work.record(arm)
        memory = footprint(config, arm.model)
        record.cost = as_record(
            measured[arm.arm],
            inputs=work.cost_inputs(arm),
            weights_bytes=memory.weights_bytes if memory.is_whole else None,
            kv_bytes=memory.kv_bytes_per_token * settings.kv_tokens if memory.is_whole else None,
            kv_tokens=settings.kv_tokens,
            is_priced=is_priced(config, arm.model),
        )
        work.records.save(record)


def _prompt_text(work: Work) -> str:
    """What prompts for timing are cut from: the first text, else the first task's questions."""
    if work.texts:
        return "".join(next(iter(work.texts.values())).texts)
    if work.tasks:
        return "\n".join(item.prompt for item in next(iter(work.tasks.values())).items)
    return "The quick brown fox jumps over the lazy dog. " * 20


def _token_counter(hosting: Hosting, arms: Sequence[ArmModel]) -> Callable[[str], int]:
    """One tokenizer for all arms whose answers are texts alone: the first that there is."""
    surface = next((found for arm in arms if (found := hosting.surface(arm.model)) is not None), None)
    if surface is None:
        return lambda text: -(-len(text) // CHARS_PER_TOKEN)
    return lambda text: len(surface.encode(text, add_special_tokens=False))


def _all_chat(hosting: Hosting, arms: Sequence[ArmModel]) -> bool:
    """Whether every arm can be asked as a chat; else all of them get raw text."""
    surfaces = [hosting.surface(arm.model) for arm in arms]
    return all(surface is None or surface.has_chat_template for surface in surfaces)
