"""The best arm of one kind against the best of another: the best ensemble against the best merge, what an owner asks.

Both are chosen by their figures on the measured items themselves, so the interval pays for the choice: it is that of
the chosen pair at the level at which the intervals of *all* pairs of the two kinds hold together
(`ensembles.comparison.simultaneous`). Held-back items would be fairer to nobody and cost half of the power.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.simultaneous import simultaneous_level
from ensemble_server.ensembles.comparison.verdict import verdict
from ensemble_server.server.compare.analysis.pairing import (
    Counted,
    Rules,
    comparisons,
    ends,
    has_figures,
    has_scores,
    same_items,
    same_texts,
    scores_of,
    text_columns,
)
from ensemble_server.server.compare.kept.records import ArmRecord
from ensemble_server.server.compare.kept.results import ArmKind, BestOfKinds

KINDS: Mapping[ArmKind, tuple[ArmKind, ...]] = {
    "ensemble": ("ensemble",),
    "merge": ("merge",),
    "distilled": ("distilled",),
    "member": ("member", "remote"),
    "cost_matched": ("cost_matched",),
}
CONTRASTS: tuple[tuple[ArmKind, ArmKind], ...] = (
    ("ensemble", "merge"),
    ("ensemble", "distilled"),
    ("ensemble", "member"),
    ("ensemble", "cost_matched"),
    ("merge", "member"),
    ("distilled", "merge"),
)


@dataclass(frozen=True)
class _Scored:
    """An arm on one measure. `influence`: what each unit adds to the error of `figure`, (num_units,)."""

    record: ArmRecord
    figure: float
    influence: np.ndarray
    num_domains: int


def best_of_kinds(records: Mapping[str, ArmRecord], counted: Counted, rules: Rules) -> Iterator[BestOfKinds]:
    """Of the means first, then of each text and each task, every contrast whose two kinds have an arm with a figure."""
    measures: list[tuple[str, Counted]] = []
    if counted.mean_texts:
        measures.append(("mean text", Counted(counted.mean_texts, (), counted.mean_texts, ())))
    if counted.mean_tasks:
        measures.append(("mean task", Counted((), counted.mean_tasks, (), counted.mean_tasks)))
    measures += [(f"text {name}", Counted([name], (), (), ())) for name in counted.texts]
    measures += [(f"task {name}", Counted((), [name], (), ())) for name in counted.tasks]
    for measure, part in measures:
        scored = _scored(list(records.values()), part, rules)
        for kind, other_kind in CONTRASTS:
            ours = [one for one in scored if one.record.kind in KINDS[kind]]
            theirs = [one for one in scored if one.record.kind in KINDS[other_kind]]
            if ours and theirs:
                found = _contrast(measure, kind, ours, other_kind, theirs, part, rules)
                if found is not None:
                    yield found


def _contrast(
    measure: str,
    kind: ArmKind,
    ours: Sequence[_Scored],
    other_kind: ArmKind,
    theirs: Sequence[_Scored],
    counted: Counted,
    rules: Rules,
) -> BestOfKinds | None:
    is_higher_better = not counted.texts and _is_higher_better(ours[0].record, counted.tasks)
    sign = -1.0 if is_higher_better else 1.0
    best, best_of_others = (min(group, key=lambda one: sign * one.figure) for group in (ours, theirs))
    pairs = list(product(ours, theirs))
    level = simultaneous_level(
        np.array([one.influence - other.influence for one, other in pairs]),
        level=rules.level,
        freedom=max(len(best.influence) - best.num_domains, 1),
        seed=rules.seed,
    )
    strict = replace(rules, alpha=1 - level)
    compared = dict(comparisons(best.record, best_of_others.record, counted, strict)).get(measure)
    if compared is None:
        return None
    difference = compared.comparison.difference
    price = rules.alpha / strict.alpha  # so many tests, as it were, that p has to stand beside
    return BestOfKinds(
        measure=measure,
        kind=kind,
        arm=best.record.name,
        other_kind=other_kind,
        other=best_of_others.record.name,
        higher_is_better=is_higher_better,
        figure=best.figure,
        other_figure=best_of_others.figure,
        difference=difference.value,
        ci=ends(difference),
        level=level,
        num_pairs=len(pairs),
        verdict=verdict(
            difference.interval,
            margin=compared.margin,
            higher_is_better=is_higher_better,
            adjusted_p_value=min(1.0, compared.comparison.p_value * price),
            smallest_p_value=min(1.0, compared.comparison.smallest_p_value * price),
            alpha=rules.alpha,
            is_answered=compared.is_answered,
        ),
    )


def _is_higher_better(record: ArmRecord, tasks: Sequence[str]) -> bool:
    return all(record.tasks[name].higher_is_better for name in tasks)


def _scored(records: Sequence[ArmRecord], counted: Counted, rules: Rules) -> list[_Scored]:
    """Arms that have a figure on every measure of these, on the items of the first such arm."""
    whole = [
        record
        for record in records
        if all(has_figures(record, name) for name in counted.texts)
        and all(has_scores(record, name) for name in counted.tasks)
    ]
    whole = [record for record in whole if _on_the_same(record, whole[0], counted)]
    return [_score(record, counted, rules) for record in whole]


def _on_the_same(record: ArmRecord, first: ArmRecord, counted: Counted) -> bool:
    return all(same_texts(record.text[name], first.text[name]) for name in counted.texts) and all(
        same_items(record.tasks[name], first.tasks[name]) for name in counted.tasks
    )


def _score(record: ArmRecord, counted: Counted, rules: Rules) -> _Scored:
    figures, influences = [], []
    columns = [(f"text {name}", *text_columns(record.text[name])) for name in counted.texts]
    for name in counted.tasks:
        scores = scores_of(record.tasks[name])
        columns.append((f"task {name}", scores, np.ones(len(scores))))
    for measure, value, size in columns:
        value, size = bootstrap.by_cluster(np.column_stack([value, size]), rules.clusters.get(measure)).T
        figure = float(value.sum() / size.sum())
        figures.append(figure)
        influences.append((value - figure * size) / size.sum() / len(columns))
    return _Scored(record, float(np.mean(figures)), np.concatenate(influences), len(columns))
