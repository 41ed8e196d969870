"""The two kinds of quality, texts and tasks, behind one face: the tables and figures of both are made alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ensemble_server.server.compare.kept.results import (
    ArmResult,
    Difference,
    Figure,
    Interval,
    MeasureIdentity,
    Results,
    TextResult,
)


@dataclass(frozen=True)
class Quality:
    """One figure of one arm. `notes`: what a reader must know besides, such as answers that are missing."""

    value: float
    ci: Interval | None
    against_baseline: Difference | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """`quality(arm, measure)`: None if the arm has no such figure; `mean(arm)`: over the measures that count alike."""

    name: Literal["text", "task"]
    title: str
    unit: str
    higher_is_better: bool
    measures: Mapping[str, MeasureIdentity]
    quality: Callable[[ArmResult, str], Quality | None]
    mean: Callable[[ArmResult], Quality | None]

    def ranked(self, results: Results) -> list[str]:
        """Names of all arms, best mean first; those without one last, in their own order."""

        def rank(arm: str) -> tuple[bool, float]:
            mean = self.mean(results.arms[arm])
            return mean is None, 0 if mean is None else -mean.value if self.higher_is_better else mean.value

        return sorted(results.arms, key=rank)


def families(results: Results) -> list[Family]:
    """Those that were measured, texts first."""
    texts = Family(
        "text", "Texts", "bits per byte", False, results.texts, _text_quality, lambda arm: _figure(arm.mean_text)
    )
    tasks = Family("task", "Tasks", "score", True, results.tasks, _task_quality, lambda arm: _figure(arm.mean_tasks))
    return [family for family in (texts, tasks) if family.measures]


def _figure(figure: Figure | None) -> Quality | None:
    return None if figure is None else Quality(figure.value, figure.ci, figure.against_baseline)


def _text_quality(arm: ArmResult, text: str) -> Quality | None:
    found: TextResult | None = arm.text.get(text)
    if found is None:
        return None
    perplexity = "beyond all numbers" if found.perplexity is None else f"{found.perplexity:.2f}"
    return Quality(found.bpb, found.ci, found.against_baseline, (f"perplexity {perplexity}",))


def _task_quality(arm: ArmResult, task: str) -> Quality | None:
    found = arm.tasks.get(task)
    if found is None:
        return None
    notes = [f"pass@{k} {share:.3f}" for k, share in sorted(found.pass_at_k.items())]
    if found.num_failed:
        notes.append(f"{found.num_failed} of {found.num_items} failed, counted as wrong")
    if found.num_missing:
        notes.append(f"{found.num_missing} of {found.num_items} without an answer, counted as wrong")
    return Quality(found.score, found.ci, found.against_baseline, tuple(notes))
