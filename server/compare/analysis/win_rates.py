"""All arms against all others at once: one strength for each, by Bradley and Terry, over the measures that count.

An item is won by the arm with the better figure on it; of a task that a model judged, by as much as it was preferred.
Intervals are over clusters where the plan names one, and over blocks of ∛n neighbouring documents of one text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress

import numpy as np

from ensemble_server.ensembles.comparison.bradley_terry import bradley_terry, outcomes_of_scores
from ensemble_server.server.compare.analysis.pairing import (
    Counted,
    Rules,
    has_figures,
    has_scores,
    same_items,
    same_texts,
    scores_of,
    text_columns,
)
from ensemble_server.server.compare.kept.records import ArmRecord, TaskRecord
from ensemble_server.server.compare.kept.results import WinRate


def win_rates(records: Mapping[str, ArmRecord], counted: Counted, rules: Rules) -> dict[str, dict[str, WinRate]]:
    """ "text", "task" -> arm -> its win rate; arms that lack one of the measures are left out."""
    found = {}
    for family, outcomes in (
        ("text", _of_texts(list(records.values()), counted.mean_texts, rules)),
        ("task", _of_tasks(list(records.values()), counted.mean_tasks, rules)),
    ):
        if outcomes is not None:
            found[family] = _rated(*outcomes, rules)
    return found


def _rated(names: Sequence[str], outcomes: np.ndarray, clusters: Sequence[object], rules: Rules) -> dict[str, WinRate]:
    strengths = bradley_terry(outcomes, clusters=clusters, seed=rules.seed, level=rules.level)
    return {
        name: WinRate(
            win_rate=one.win_rate,
            log_strength=one.log_strength,
            ci=None if one.interval is None else (one.interval.low, one.interval.high),
            num_items=outcomes.shape[2],
        )
        for name, one in zip(names, strengths, strict=True)
    }


_Outcomes = tuple[list[str], np.ndarray, list[object]]
"""Arms; (num_arms, num_arms, num_items); the cluster of each item."""


def _of_texts(records: Sequence[ArmRecord], texts: Sequence[str], rules: Rules) -> _Outcomes | None:
    having = [record for record in records if texts and all(has_figures(record, text) for text in texts)]
    having = [one for one in having if all(same_texts(one.text[text], having[0].text[text]) for text in texts)]
    if len(having) < 2:
        return None
    parts: list[np.ndarray] = []
    clusters: list[object] = []
    for text in texts:
        columns = [text_columns(record.text[text]) for record in having]
        is_scored = np.all([size > 0 for _, size in columns], axis=0)
        parts.append(outcomes_of_scores(np.array([-(bits / size)[is_scored] for bits, size in _safe(columns)])))
        clusters += compress(_clusters(f"text {text}", len(is_scored), rules), is_scored)
    return [record.name for record in having], np.concatenate(parts, axis=2), clusters


def _clusters(measure: str, num_items: int, rules: Rules) -> list[object]:
    """Of each item, told apart from those of other measures."""
    named = rules.clusters.get(measure)
    if named is not None:
        return [(measure, name) for name in named]
    together = round(num_items ** (1 / 3)) if measure in rules.neighbours else 1
    return [(measure, place // max(together, 1)) for place in range(num_items)]


def _safe(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """With one byte for none: such documents are left out afterwards."""
    return [(bits, np.where(size > 0, size, 1.0)) for bits, size in columns]


def _of_tasks(records: Sequence[ArmRecord], tasks: Sequence[str], rules: Rules) -> _Outcomes | None:
    having = [record for record in records if tasks and all(has_scores(record, task) for task in tasks)]
    having = [one for one in having if all(same_items(one.tasks[task], having[0].tasks[task]) for task in tasks)]
    if len(having) < 2:
        return None
    names = [record.name for record in having]
    parts = [_of_task([record.tasks[task] for record in having], names) for task in tasks]
    clusters = [one for task in tasks for one in _clusters(f"task {task}", len(having[0].tasks[task].items), rules)]
    return names, np.concatenate(parts, axis=2), clusters


def _of_task(records: Sequence[TaskRecord], names: Sequence[str]) -> np.ndarray:
    """(num_arms, num_arms, num_items)"""
    if all(item.preferences for record in records for item in record.items):
        return np.array(
            [[[item.preferences.get(other, 0.5) for item in record.items] for other in names] for record in records]
        )
    sign = 1.0 if records[0].higher_is_better else -1.0
    return outcomes_of_scores(sign * np.array([scores_of(record) for record in records]))
