"""Cost-matched baselines: what would the best single member do with the same money?

The best member is the one with the best mean score on held-out rows (`dev`), never on those that are scored. It gets as
many samples as an ensemble's cost buys, and answers by their majority, or by a crowd vote where answers are texts.
A likelihood and a text's bits per byte have no use for samples, so there is no such arm for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ensemble_server.server.compare.analysis.pairing import scores_of
from ensemble_server.server.compare.arms.candidates import ArmModel, Entry, kind_of
from ensemble_server.server.compare.arms.footprint import groups, leaves
from ensemble_server.server.compare.deciding.preparation import config_with
from ensemble_server.server.compare.kept.records import ArmRecord, Preparation, Records
from ensemble_server.server.compare.kept.results import Choice
from ensemble_server.server.compare.planning.blocks import CostMatched, TaskSource
from ensemble_server.server.compare.planning.sources import read_tasks
from ensemble_server.server.compare.running.measuring import measure_group
from ensemble_server.server.compare.running.work import Work, introduce
from ensemble_server.server.config.blocks import Config

VOTED_AS = {"number": "number", "choice": "choice", "yes_no": "yes_no", "exact_match": "text"}
SIMILAR_TEXTS = ("rouge_l", "chrf")


@dataclass(frozen=True)
class Matched:
    """The arms that were added, and what the report must say of how that was done."""

    arms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


async def measure_matched(
    work: Work, entries: Mapping[str, Entry], arms: Sequence[ArmModel], folder: Path, free_bytes: float
) -> Matched:
    """Choose, build and measure them. `arms`: those of the plan, measured, as `entries` made them models.

    `folder`: where figures of held-out rows are kept.
    """
    file = work.plan.file
    settings = file.cost_matched or CostMatched()
    held_out = [task.model_copy(update={"data": task.dev}) for task in file.tasks if task.dev is not None]
    ensembles = [arm for arm in arms if _is_matched(work, arm, settings)]
    if not ensembles:
        return Matched()
    if not held_out:
        return Matched(
            notes=(
                "No cost-matched arm: no task has held-out rows (`dev`) on which a single member could be chosen. "
                "Bits per byte have no use for samples.",
            )
        )
    config = config_with(work.plan, None, entries)
    choosing = replace(
        work, texts={}, tasks=read_tasks(held_out), records=Records(folder), with_harness=False, is_speed_measured=False
    )
    choice = await _best_member(choosing, config, ensembles, free_bytes)
    if choice is None:
        return Matched(notes=("No cost-matched arm: no single member could be scored on the held-out rows.",))
    price = await _price(work, choosing, config, choice.name, settings)
    kinds = _tasks_by_kind(file.tasks)
    notes = [
        f"{task}: likelihoods have no use for samples, so there is no cost-matched arm." for task in kinds.pop(None, ())
    ]
    matched: dict[int, list[str]] = {}
    for arm in ensembles:
        cost = _cost(work.record(arm), settings)
        if cost is None or not price:
            notes.append(f"{arm.arm}: its cost could not be measured, so no arm is matched to it.")
        else:
            matched.setdefault(min(max(round(cost / price), 1), settings.max_samples), []).append(arm.arm)
    if 1 in matched and choice.name in work.plan.arms:
        names = ", ".join(matched.pop(1))
        notes.append(f"The cost of {names} buys one sample of {choice.name}, which is an arm already.")
    made: list[str] = []
    for kind, tasks in kinds.items():
        arms_of_kind, entries_of_kind = [], dict(entries)
        for num_samples, names in sorted(matched.items()):
            name = f"{choice.name}x{num_samples}" + (f"-{kind}" if len(kinds) > 1 else "")
            description = (
                f"{choice.name}, the best single member on held-out rows, with {num_samples} samples: the cost of "
                f"{', '.join(names)}"
            )
            arms_of_kind.append(ArmModel(name, None, name, "cost_matched", (choice.name,), description))
            entries_of_kind[name] = _entry(choice.name, num_samples, kind, settings)
            work.records.get(name).preparation = Preparation(inputs="", chosen=choice)
        part = replace(work, texts={}, tasks={task: work.tasks[task] for task in tasks}, with_harness=False)
        extended = config_with(work.plan, None, entries_of_kind)
        await measure_group(part, extended, introduce(part, extended, arms_of_kind))
        made += [arm.arm for arm in arms_of_kind]
    return Matched(tuple(made), tuple(notes))


def _is_matched(work: Work, arm: ArmModel, settings: CostMatched) -> bool:
    is_wanted = settings.ensembles is None or arm.arm in settings.ensembles
    return is_wanted and arm.kind == "ensemble" and work.record(arm).failure is None


async def _best_member(
    choosing: Work, config: Config, ensembles: Sequence[ArmModel], free_bytes: float
) -> Choice | None:
    """Of all single models that the ensembles consist of; the first of equals."""
    names = list(dict.fromkeys(name for arm in ensembles for name in sorted(leaves(config, arm.model))))
    members = [ArmModel(name, None, name, kind_of(config.models[name]), (name,)) for name in names]
    for group in groups(config, introduce(choosing, config, members), free_bytes=free_bytes):
        await measure_group(choosing, config, group)
    candidates = {}
    for member in members:
        record = choosing.record(member)
        known = [task for name, task in record.tasks.items() if name in choosing.tasks and task.skipped is None]
        if record.failure is None and len(known) == len(choosing.tasks):
            candidates[member.arm] = float(np.mean([scores_of(task).mean() for task in known]))
    if not candidates:
        return None
    return Choice(name=max(candidates, key=lambda name: candidates[name]), candidates=candidates, measure="score")


async def _price(work: Work, choosing: Work, config: Config, member: str, settings: CostMatched) -> float | None:
    """What the member's own answer token costs; measured now if the member is no arm of the plan."""
    if member in work.plan.arms and (price := _cost(work.records.get(member), settings)) is not None:
        return price
    arm = ArmModel(member, None, member, kind_of(config.models[member]), (member,))
    await measure_group(replace(choosing, tasks={}, is_speed_measured=True), config, [arm])
    return _cost(choosing.record(arm), settings)


def _cost(record: ArmRecord, settings: CostMatched) -> float | None:
    if record.cost is None:
        return None
    return (
        record.cost.forward_tokens_per_answer_token
        if settings.by == "forward_tokens"
        else record.cost.seconds_per_answer_token
    )


def _tasks_by_kind(tasks: Sequence[TaskSource]) -> dict[str | None, list[str]]:
    """How samples of a task are made one answer -> tasks; None for those that cannot use samples."""
    kinds: dict[str | None, list[str]] = {}
    for task in tasks:
        kind = VOTED_AS.get(task.metric, "crowd" if task.metric in SIMILAR_TEXTS else None)
        kinds.setdefault(kind, []).append(task.name)
    return kinds


def _entry(member: str, num_samples: int, kind: str | None, settings: CostMatched) -> Entry:
    common = {"members": [member], "samples": num_samples}
    if num_samples > 1:
        common["temperature"] = settings.temperature  # else one sample, as the task asks for it
    if kind == "crowd":
        return {"method": "crowd_vote", "similarity": {"rouge_l_word": 1}, **common}
    return {"method": "majority", "answer": kind, "early_stop": False, **common}
