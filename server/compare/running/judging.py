"""Tasks of the metric `judge`: a model of the config reads the arms' answers to each question in pairs, in both orders.

    preference_ij = 1/2 (p(A | i shown as A, j as B) + p(B | j shown as A, i as B))        of one item
    score_i       = mean over the other arms j of preference_ij                            1/2 is par

So a score depends on which arms there are; a difference of two arms' scores is one of their standing among all of them.
An answer that failed loses against one that did not. It runs once all arms have answered, and again when one of them
answers anew (`ensembles.ranking` asks the judge, as a `ranking` does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.ensembles.ranking import compare_by_judge
from ensemble_server.server.compare.analysis.pairing import same_items
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.records import ArmRecord, ItemRecord, inputs_hash
from ensemble_server.server.compare.measures.task_measure import Item, Task
from ensemble_server.server.compare.planning.blocks import TaskSource
from ensemble_server.server.compare.running.work import Work, described
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.hosting import Hosting

AT_ONCE = 4  # items


async def judge_tasks(work: Work, arms: Sequence[str]) -> None:
    """Score every task of the metric `judge` under all `arms` that have answered it; what stands is not asked again.

    Where the judge cannot be loaded or asked, the task has no figure, with the reason.
    """
    for source in work.plan.file.tasks:
        if source.metric != "judge" or source.name not in work.tasks:
            continue
        records = _having(work, source.name, arms)
        if len(records) < 2:
            continue
        try:
            inputs = _inputs(work, source, records)
            if all(record.tasks[source.name].judged == inputs for record in records):
                continue
            work.listener.stage(f"task {source.name}: {source.judge} judges {', '.join(one.name for one in records)}")
            judged = await _judged(work, source, work.tasks[source.name], records)
        except Exception as exc:  # whatever loading and asking may raise ends this task alone
            for record in records:
                record.tasks[source.name].skipped = f"judge {source.judge!r}: {described(exc)}"
                work.records.save(record)
            continue
        _note(work, source.name, records, judged, inputs)


def _having(work: Work, task: str, arms: Sequence[str]) -> list[ArmRecord]:
    records = [record for arm in arms if (record := work.records.get(arm)).tasks.get(task) and record.tasks[task].items]
    return [record for record in records if same_items(record.tasks[task], records[0].tasks[task])]


def _inputs(work: Work, source: TaskSource, records: Sequence[ArmRecord]) -> str:
    assert source.judge is not None, "checked when the plan was read"
    answers = {record.name: [_answer(item) for item in record.tasks[source.name].items] for record in records}
    judge = identity(work.plan.config, source.judge)
    return inputs_hash({"judge": judge, "criterion": source.criterion, "answers": answers})


def _answer(item: ItemRecord) -> str | None:
    """None where there is none."""
    return item.outputs[0] if item.error is None and item.outputs and item.outputs[0].strip() else None


async def _judged(work: Work, source: TaskSource, task: Task, records: Sequence[ArmRecord]) -> list[np.ndarray]:
    """For each item (num_arms, num_arms): row preferred to column."""
    assert source.judge is not None, "checked when the plan was read"
    items = {item.id: item for item in task.items}
    asked = [items[item.id] for item in records[0].tasks[task.name].items]
    answers = [[_answer(record.tasks[task.name].items[place]) for record in records] for place in range(len(asked))]
    places = asyncio.Semaphore(AT_ONCE)
    num_done = 0
    async with Hosting.open(excerpt(work.plan.config, [source.judge])) as hosting:
        judge = hosting.models[source.judge]

        async def one(item: Item, texts: Sequence[str | None]) -> np.ndarray:
            nonlocal num_done
            async with places:
                found = _by_default(texts)
                given = [place for place, text in enumerate(texts) if text is not None]
                if len({texts[place] for place in given}) > 1:
                    compared = await compare_by_judge(
                        judge,
                        _request(task, item),
                        [str(texts[place]) for place in given],
                        ensemble=f"task {task.name}",
                        criterion=source.criterion,
                    )
                    found[np.ix_(given, given)] = np.array(compared.trace["preferences"])
                num_done += 1
                work.listener.progress(num_done, len(asked))
                return found

        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(one(item, texts)) for item, texts in zip(asked, answers, strict=True)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one is enough: they fail for one reason
    return [each.result() for each in running]


def _by_default(texts: Sequence[str | None]) -> np.ndarray:
    """What needs no judge: an answer beats none, two equals are a draw."""
    has = np.array([text is not None for text in texts], dtype=float)
    return (1 + has[:, None] - has[None, :]) / 2


def _request(task: Task, item: Item) -> GenerationRequest:
    prompt = task.prompt_of(item)
    if isinstance(prompt, str):
        return GenerationRequest(prompt=prompt, priority=1)
    return GenerationRequest(messages=prompt, priority=1)


def _note(work: Work, task: str, records: Sequence[ArmRecord], judged: Sequence[np.ndarray], inputs: str) -> None:
    for row, record in enumerate(records):
        of_task = record.tasks[task]
        for place, matrix in enumerate(judged):
            others: Mapping[str, float] = {
                other.name: float(matrix[row, column]) for column, other in enumerate(records) if column != row
            }
            of_task.items[place].preferences = dict(others)
            of_task.items[place].score = float(np.mean(list(others.values())))
        of_task.judged, of_task.skipped = inputs, None
        work.records.save(record)
