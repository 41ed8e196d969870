"""What a comparison will be able to say, before anything is measured: how many items there are, and how many it takes.

Beside m arms Holm's correction leaves the first of them alpha / m. Documents are judged by Student's test, which needs
MIN_UNITS of them; right and wrong answers by McNemar's, whose smallest p is 2 / 2ⁿ (`ensembles.comparison.power`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ensemble_server.ensembles.comparison.paired import MIN_UNITS
from ensemble_server.ensembles.comparison.power import (
    effect_of_units,
    items_for_any_verdict,
    items_for_difference,
    items_for_equivalence,
)
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import Task
from ensemble_server.server.compare.planning.blocks import PlanFile

DIFFERENCE = 0.05  # of shares of right answers, for which the number of questions is told ...
DIVIDED = 0.2  # ... if so many of them divide the two models

MIN_BEGINNING = 200  # characters that two prompts share beyond their template's own
MANY = 0.2  # of the questions of a task


@dataclass(frozen=True)
class Outlook:
    """`num_items`: documents, questions, or clusters of them; `num_needed`: the least that allow a verdict."""

    measure: str
    num_items: int
    num_needed: int
    sentence: str

    @property
    def is_hopeless(self) -> bool:
        return self.num_items < self.num_needed


def outlooks(
    file: PlanFile,
    texts: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    clusters: Mapping[str, Sequence[str]],
) -> list[Outlook]:
    """Of every text and task, in the plan's order. `clusters`: measure -> the cluster of each of its items."""
    num_arms = max(len(file.arms) - 1, 1)
    found = []
    for name, documents in texts.items():
        found.append(_of_text(name, len(documents), clusters.get(f"text {name}"), num_arms, file.statistics.alpha))
    for name, task in tasks.items():
        found.append(_of_task(name, len(task.items), clusters.get(f"task {name}"), num_arms, file))
    return found


def _of_text(name: str, num: int, groups: Sequence[str] | None, num_arms: int, alpha: float) -> Outlook:
    units = num if groups is None else len(set(groups))
    counted = f"{num} documents" + ("" if groups is None else f" in {units} clusters")
    said = f"text {name}: {counted}; a verdict takes {MIN_UNITS}"
    effect = effect_of_units(units, num_arms, alpha=alpha)
    if units >= MIN_UNITS and effect is not None:
        said += (
            f". They show a difference of {effect:.2g} standard deviations (of documents) four times in five"
            f"{_beside(num_arms)}"
        )
    return Outlook(f"text {name}", units, MIN_UNITS, said)


def _of_task(name: str, num: int, groups: Sequence[str] | None, num_arms: int, file: PlanFile) -> Outlook:
    alpha, margin = file.statistics.alpha, file.statistics.margin_score
    units = num if groups is None else len(set(groups))
    needed = items_for_any_verdict(num_arms, alpha=alpha)
    counted = f"{num} questions" + ("" if groups is None else f" in {units} clusters, which are what counts")
    equivalent = items_for_equivalence(margin, alpha=alpha)
    more = [f"{needed} to call an arm better{_beside(num_arms)} if every one divides them alike"]
    more += [f"{equivalent} for no difference within {margin:g}"] if equivalent is not None else []
    to_show = items_for_difference(DIFFERENCE, DIVIDED, num_arms, alpha=alpha)
    more.append(f"{to_show} to show {DIFFERENCE:g} four times in five, if {DIVIDED:.0%} of them divide the two")
    return Outlook(f"task {name}", units, needed, f"task {name}: {counted}; it takes {', '.join(more)}")


def _beside(num_arms: int) -> str:
    return f" beside {num_arms - 1} other arms" if num_arms > 1 else ""


def shared_beginnings(file: PlanFile, tasks: Mapping[str, Task]) -> Iterator[str]:
    """A warning for each task without `cluster` many of whose prompts begin alike, beyond what their template says."""
    for source in file.tasks:
        if source.cluster is not None:
            continue
        own = len(source.template.split("{{")[0].split("{%")[0])
        beginnings: dict[str, int] = {}
        prompts = [item.prompt[own:] for item in tasks[source.name].items]
        for prompt in prompts:
            if len(prompt) >= MIN_BEGINNING:
                beginning = prompt[:MIN_BEGINNING]
                beginnings[beginning] = beginnings.get(beginning, 0) + 1
        alike = [count for count in beginnings.values() if count > 1]
        if sum(alike) > MANY * len(prompts):
            yield (
                f"task {source.name}: {sum(alike)} of {len(prompts)} prompts share their first {MIN_BEGINNING} "
                f"characters with another one ({len(alike)} beginnings, the commonest {max(alike)} times). Questions "
                "on one passage are not independent; name a field of the rows that says which go together as `cluster`"
            )
