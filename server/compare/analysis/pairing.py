"""An arm against the baseline on the same items, measure by measure: the pairs, the tests, the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.dependence import design_effect, independent, of_neighbours
from ensemble_server.ensembles.comparison.intervals import Estimate
from ensemble_server.ensembles.comparison.paired import (
    Columns,
    Comparison,
    compare_ratios,
    compare_right_wrong,
    compare_scores,
    mean_of_tasks,
    spread_of,
    stretch,
)
from ensemble_server.ensembles.comparison.proportions import wilson
from ensemble_server.ensembles.comparison.significance import combined, holm
from ensemble_server.ensembles.comparison.verdict import verdict
from ensemble_server.server.compare.kept.records import ArmRecord, TaskRecord, TextRecord
from ensemble_server.server.compare.kept.results import Difference, Interval
from ensemble_server.server.compare.planning.blocks import PlanFile


@dataclass(frozen=True)
class Rules:
    """The plan's statistics, as the functions of `ensembles.comparison` take them."""

    seed: int
    num_resamples: int
    alpha: float
    margin_bpb: float
    margin_score: float
    clusters: Mapping[str, Sequence[str]] = field(default_factory=dict)  # measure -> the cluster of each of its items
    neighbours: frozenset[str] = frozenset()  # measures whose items stand next to each other in one text

    @property
    def level(self) -> float:
        return 1 - self.alpha

    @property
    def sampling(self) -> dict[str, Any]:
        return {"seed": self.seed, "num_resamples": self.num_resamples, "level": self.level}


@dataclass(frozen=True)
class Unadjusted:
    """A comparison before Holm's correction. `margin`: the smallest difference that matters. `is_answered`: both have
    an answer to some item."""

    comparison: Comparison
    margin: float
    higher_is_better: bool
    is_answered: bool = True


def rules_of(file: PlanFile, clusters: Mapping[str, Sequence[str]]) -> Rules:
    """`clusters`: measure -> the cluster of each of its items, where the plan names one."""
    chosen = file.statistics
    return Rules(
        chosen.seed,
        chosen.resamples,
        chosen.alpha,
        chosen.margin_bpb,
        chosen.margin_score,
        clusters,
        frozenset(f"text {name}" for name, source in file.text.items() if source.is_one_text),
    )


# --- columns -----------------------------------------------------------------------------------------------------


def has_figures(record: ArmRecord, text: str) -> bool:
    return text in record.text and record.text[text].skipped is None


def has_scores(record: ArmRecord, task: str) -> bool:
    return task in record.tasks and record.tasks[task].skipped is None


def text_columns(record: TextRecord) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of each document, (num_documents,) each."""
    return np.array(record.nats) / math.log(2), np.array(record.num_bytes)


def scores_of(record: TaskRecord) -> np.ndarray:
    """(num_items,): 0 where an item failed or gave no answer."""
    return np.array([item.score for item in record.items])


def same_items(ours: TaskRecord, theirs: TaskRecord) -> bool:
    """Whether both were asked the same, by hash: the items, and each prompt as it was sent."""
    return ours.items_sha256 == theirs.items_sha256 and [(item.id, item.prompt_sha256) for item in ours.items] == [
        (item.id, item.prompt_sha256) for item in theirs.items
    ]


def same_texts(ours: TextRecord, theirs: TextRecord) -> bool:
    return ours.items_sha256 == theirs.items_sha256 and len(ours.nats) == len(theirs.nats)


# --- comparisons with the baseline -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What a comparison looks at: all measures, and those of them whose mean is taken."""

    texts: Sequence[str]
    tasks: Sequence[str]
    mean_texts: Sequence[str]
    mean_tasks: Sequence[str]


def comparisons(
    record: ArmRecord, baseline: ArmRecord, counted: Counted, rules: Rules
) -> Iterator[tuple[str, Unadjusted]]:
    """Of each measure that both have on the same items, and of the means over those that count."""
    texts = {
        name: scored_columns(record.text[name], baseline.text[name])
        for name in counted.texts
        if has_figures(record, name) and has_figures(baseline, name)
        if same_texts(record.text[name], baseline.text[name])
    }
    of_texts = {name: compare_texts([name], texts, rules) for name in texts}
    for name, compared in of_texts.items():
        yield f"text {name}", Unadjusted(compared, rules.margin_bpb, higher_is_better=False)
    if counted.mean_texts and all(name in texts for name in counted.mean_texts):
        means = list(counted.mean_texts)
        compared = of_texts[means[0]] if len(means) == 1 else compare_texts(means, texts, rules)
        yield "mean text", Unadjusted(compared, rules.margin_bpb, higher_is_better=False)

    tasks = {
        name: (record.tasks[name], baseline.tasks[name])
        for name in counted.tasks
        if has_scores(record, name) and has_scores(baseline, name)
        if same_items(record.tasks[name], baseline.tasks[name])
    }
    of_tasks = {name: compare_task(name, *pair, rules) for name, pair in tasks.items()}
    answered = {name: all(map(is_answered, pair)) for name, pair in tasks.items()}
    for name, compared in of_tasks.items():
        yield (
            f"task {name}",
            Unadjusted(compared, rules.margin_score, tasks[name][0].higher_is_better, answered[name]),
        )
    if counted.mean_tasks and all(name in tasks for name in counted.mean_tasks):
        means = list(counted.mean_tasks)
        compared = of_tasks[means[0]] if len(means) == 1 else compare_tasks(means, of_tasks, tasks, rules)
        has_answers = any(answered[name] for name in means)
        yield "mean task", Unadjusted(compared, rules.margin_score, higher_is_better=True, is_answered=has_answers)


def scored_columns(ours: TextRecord, theirs: TextRecord) -> Columns:
    """Bits and bytes of both; ones that count for nothing stand where a model scored no token of a document."""
    return (*text_columns(ours), *text_columns(theirs))


def compare_texts(names: Sequence[str], columns: Mapping[str, Columns], rules: Rules) -> Comparison:
    """The mean over these texts, each counted alike; of one text its own difference."""
    kept, clusters = [], []
    num_ties = 0
    for name in names:
        is_scored = (columns[name][1] > 0) & (columns[name][3] > 0)  # else shorter than a token
        bits, num_bytes, their_bits, their_bytes = (column[is_scored] for column in columns[name])
        kept.append((bits, num_bytes, their_bits, their_bytes))
        groups = rules.clusters.get(f"text {name}")
        clusters.append(None if groups is None else list(compress(groups, is_scored)))
        num_ties += int((~is_scored).sum())
    found = compare_ratios(
        kept,
        clusters=clusters,
        are_neighbours=[f"text {name}" in rules.neighbours for name in names],
        higher_is_better=False,
        **rules.sampling,
    )
    return replace(found, ties=found.ties + num_ties)


def compare_task(name: str, ours: TaskRecord, theirs: TaskRecord, rules: Rules) -> Comparison:
    scores, their_scores = scores_of(ours), scores_of(theirs)
    clusters = rules.clusters.get(f"task {name}")
    if not ours.higher_is_better:
        compared = compare_scores(scores, their_scores, clusters=clusters, **rules.sampling)
        return replace(compared, wins=compared.losses, losses=compared.wins)
    if is_right_or_wrong(scores) and is_right_or_wrong(their_scores):
        return compare_right_wrong(scores, their_scores, clusters=clusters, **rules.sampling)
    return compare_scores(scores, their_scores, clusters=clusters, **rules.sampling)


def compare_tasks(
    names: Sequence[str],
    compared: Mapping[str, Comparison],
    tasks: Mapping[str, tuple[TaskRecord, TaskRecord]],
    rules: Rules,
) -> Comparison:
    """The mean over these tasks, each counted alike."""
    return mean_of_tasks(
        [compared[name] for name in names],
        [scores_of(ours) - scores_of(theirs) for ours, theirs in (tasks[name] for name in names)],
        clusters=[rules.clusters.get(f"task {name}") for name in names],
        seed=rules.seed,
        level=rules.level,
    )


def is_right_or_wrong(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def is_answered(record: TaskRecord) -> bool:
    """Whether there is an answer to any item; of a likelihood there always is."""
    return any(item.error is None and any(answer is not None for answer in item.answers) for item in record.items)


def figure_of_texts(names: Sequence[str], records: Mapping[str, TextRecord], rules: Rules) -> Estimate:
    """The mean over texts of their bits per byte, each counted alike, with its interval over documents."""
    columns, plain, spreads = [], [], []
    for name in names:
        bits, num_bytes = text_columns(records[name])
        pair = bootstrap.by_cluster(np.column_stack([bits, num_bytes]), rules.clusters.get(f"text {name}"))
        pair = pair[pair[:, 1] > 0]
        columns.append((pair[:, 0], pair[:, 1]))
        influence = (pair[:, 0] - pair[:, 0].sum() / pair[:, 1].sum() * pair[:, 1]) / pair[:, 1].sum() / len(names)
        are_neighbours = f"text {name}" in rules.neighbours and f"text {name}" not in rules.clusters
        how = of_neighbours(influence) if are_neighbours else independent(len(influence))
        if len(influence) > 1:
            plain.append(spread_of(influence, independent(len(influence))))
            spreads.append(spread_of(influence, how))
    estimate = bootstrap.macro_ratio(columns, **rules.sampling)
    if estimate.interval is None:
        return estimate
    found = estimate.stretched(*stretch(combined(plain), combined(spreads), rules.level))
    assert found.interval is not None, "stretching leaves it there"
    return replace(found, interval=replace(found.interval, low=max(found.interval.low, 0.0)))  # no bits below none


def figure_of_tasks(names: Sequence[str], records: Mapping[str, TaskRecord], rules: Rules) -> Estimate:
    """The mean over tasks of their scores, each counted alike; the tasks' intervals put together by their squares."""
    of_tasks = [_figure_of_task(records[name], rules.clusters.get(f"task {name}"), rules) for name in names]
    if len(of_tasks) == 1:
        return of_tasks[0]
    value = float(np.mean([one.value for one in of_tasks]))
    known = [(one.value, one.interval) for one in of_tasks if one.interval is not None]
    num_units = sum(one.num_units for one in of_tasks)
    if len(known) < len(of_tasks):
        return Estimate(value, None, None, num_units)
    below = math.hypot(*(own - interval.low for own, interval in known)) / len(known)
    above = math.hypot(*(interval.high - own for own, interval in known)) / len(known)
    interval = replace(known[0][1], low=value - below, high=value + above)
    return Estimate(value, interval, None, num_units)


def _figure_of_task(record: TaskRecord, clusters: Sequence[str] | None, rules: Rules) -> Estimate:
    """Wilson's interval where scores are right or wrong, or all alike: a bootstrap of these would be a point."""
    scores = scores_of(record)
    found = bootstrap.mean(scores, clusters=clusters, **rules.sampling)
    is_share = is_right_or_wrong(scores) or (np.ptp(scores) == 0 and 0 <= scores[0] <= 1)
    if not is_share or (clusters is not None and found.interval is None):
        return found
    effect, freedom = 1.0, None
    if clusters is not None:
        effect, freedom = design_effect(scores, clusters), found.num_units - 1
    share = wilson(float(scores.sum()) / effect, len(scores) / effect, level=rules.level, freedom=freedom)
    return replace(found, interval=share)


# --- verdicts ----------------------------------------------------------------------------------------------------


def adjusted(family: Mapping[str, Unadjusted], rules: Rules) -> dict[str, Difference]:
    """With Holm's correction over the family: the arms of one measure."""
    p_values = holm([unadjusted.comparison.p_value for unadjusted in family.values()])
    return {
        arm: _difference(unadjusted, p_holm, len(family), rules)
        for (arm, unadjusted), p_holm in zip(family.items(), p_values, strict=True)
    }


def _difference(unadjusted: Unadjusted, p_holm: float, num_comparisons: int, rules: Rules) -> Difference:
    compared = unadjusted.comparison
    return Difference(
        difference=compared.difference.value,
        ci=ends(compared.difference),
        p=compared.p_value,
        p_holm=p_holm,
        test=compared.test,
        verdict=verdict(
            compared.difference.interval,
            margin=unadjusted.margin,
            higher_is_better=unadjusted.higher_is_better,
            adjusted_p_value=p_holm,
            smallest_p_value=min(1.0, compared.smallest_p_value * num_comparisons),
            alpha=rules.alpha,
            is_answered=unadjusted.is_answered,
        ),
        effect_size=compared.effect_size if math.isfinite(compared.effect_size) else None,
        effect_size_name=compared.effect_size_name,
        detectable=compared.detectable(alpha=rules.alpha, num_comparisons=num_comparisons),
        wins=compared.wins,
        ties=compared.ties,
        losses=compared.losses,
        lag=compared.lag,
        num_units=compared.difference.num_units,
    )


def ends(estimate: Estimate) -> Interval | None:
    return estimate.interval and (estimate.interval.low, estimate.interval.high)
