"""Where an arm and the baseline part: the items that flipped, side by side, with each member's view of each token.

Tasks: questions that one of them got right and the other did not (or whose scores lie furthest apart). Texts: the
documents whose bits per byte moved most. The members' view is taken while the arm is loaded (`running.views`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_server.ensembles.base import Message
from ensemble_server.server.compare.analysis.pairing import has_figures, same_items, same_texts, text_columns
from ensemble_server.server.compare.kept.records import ArmRecord, ItemRecord, inputs_hash
from ensemble_server.server.compare.kept.results import Flip
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import CHOICE_METRICS, Task

if TYPE_CHECKING:
    pass

MAX_CHARS = 600  # of a document or a prompt that is shown


@dataclass(frozen=True)
class Flipped:
    """A flip and whose tokens are shown: those of `continuation`, after `prompt` (raw text or messages)."""

    flip: Flip
    key: str
    prompt: str | tuple[Message, ...]
    continuation: str


def flipped_items(
    record: ArmRecord,
    baseline: ArmRecord,
    texts: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    *,
    per_measure: int,
) -> Iterator[Flipped]:
    """The items of each measure that an arm and the baseline differ most on; the plainest first."""
    if record.name == baseline.name or per_measure == 0:
        return
    for name, documents in texts.items():
        if has_figures(record, name) and has_figures(baseline, name):
            ours, theirs = record.text[name], baseline.text[name]
            if same_texts(ours, theirs) and len(documents) == len(ours.nats):
                yield from _flipped_documents(record.name, name, documents, ours, theirs, per_measure)
    for name, task in tasks.items():
        ours, theirs = record.tasks.get(name), baseline.tasks.get(name)
        if ours is not None and theirs is not None and same_items(ours, theirs):
            yield from _flipped_answers(record.name, name, task, ours.items, theirs.items, per_measure)


def _flipped_documents(
    arm: str, name: str, documents: Documents, ours: Any, theirs: Any, per_measure: int
) -> Iterator[Flipped]:
    bits, num_bytes = text_columns(ours)
    their_bits, their_bytes = text_columns(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        costs, their_costs = bits / num_bytes, their_bits / their_bytes
    moved = np.nan_to_num(np.abs(costs - their_costs))
    for index in np.argsort(-moved, kind="stable")[:per_measure]:
        if not moved[index]:
            return
        flip = Flip(
            arm=arm,
            measure=f"text {name}",
            item=f"document {index}",
            is_better=bool(costs[index] < their_costs[index]),
            prompt=documents.texts[index][:MAX_CHARS],
            reference=None,
            baseline_output=None,
            arm_output=None,
            baseline_score=float(their_costs[index]),
            arm_score=float(costs[index]),
        )
        yield Flipped(flip, f"{flip.measure}: {flip.item}", "", flip.prompt)


def _flipped_answers(
    arm: str,
    name: str,
    task: Task,
    ours: Sequence[ItemRecord],
    theirs: Sequence[ItemRecord],
    per_measure: int,
) -> Iterator[Flipped]:
    moved = np.array([abs(mine.score - other.score) for mine, other in zip(ours, theirs, strict=True)])
    items = {item.id: item for item in task.items}
    for index in np.argsort(-moved, kind="stable")[:per_measure]:
        mine, other = ours[index], theirs[index]
        if not moved[index] or mine.id not in items:
            return
        item = items[mine.id]
        flip = Flip(
            arm=arm,
            measure=f"task {name}",
            item=mine.id,
            is_better=mine.score > other.score,
            prompt=item.prompt[:MAX_CHARS],
            reference=mine.reference,
            baseline_output=_output(other),
            arm_output=_output(mine),
            baseline_score=other.score,
            arm_score=mine.score,
        )
        is_text = task.metric not in CHOICE_METRICS  # of a likelihood the output is a table of the options
        continuation = mine.outputs[0] if mine.outputs and is_text else ""
        yield Flipped(flip, f"{flip.measure}: {flip.item}", task.prompt_of(item), continuation)


def _output(item: ItemRecord) -> str:
    return f"error: {item.error}" if item.error is not None else (item.outputs[0] if item.outputs else "")


def flips(
    record: ArmRecord,
    baseline: ArmRecord,
    texts: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    *,
    per_measure: int,
) -> list[Flip]:
    """For the report, with the members' view where it was taken."""
    found = []
    for flipped in flipped_items(record, baseline, texts, tasks, per_measure=per_measure):
        view = record.views.get(flipped.key)
        if view is not None and view.inputs == view_inputs(record, flipped):
            found.append(flipped.flip.model_copy(update={"tokens": tuple(view.tokens)}))
        else:
            found.append(flipped.flip)
    return found


def view_inputs(record: ArmRecord, flipped: Flipped) -> str:
    """What a view was taken of: another one is no view of this item."""
    return inputs_hash({"model": record.identity, "key": flipped.key, "text": flipped.continuation})
