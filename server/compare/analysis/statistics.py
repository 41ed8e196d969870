"""From records to results: every arm's figures, with intervals. No model and no clock: same in, same out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ensemble_server.ensembles.comparison.paired import influence_on_difference
from ensemble_server.ensembles.comparison.pass_at_k import pass_at_k
from ensemble_server.ensembles.comparison.replicates import crossed_ratio_difference
from ensemble_server.server.compare.analysis.best_of_kinds import best_of_kinds
from ensemble_server.server.compare.analysis.null_check import check_of_neighbours, null_check
from ensemble_server.server.compare.analysis.pairing import (
    Counted,
    Rules,
    Unadjusted,
    adjusted,
    compare_task,
    compare_texts,
    comparisons,
    ends,
    figure_of_tasks,
    figure_of_texts,
    has_figures,
    has_scores,
    rules_of,
    same_items,
    same_texts,
    scored_columns,
    text_columns,
)
from ensemble_server.server.compare.analysis.pairs import all_pairs
from ensemble_server.server.compare.analysis.win_rates import win_rates
from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.kept.records import ArmRecord, ItemRecord, Records, TaskRecord, TextRecord
from ensemble_server.server.compare.kept.results import (
    ArmResult,
    Difference,
    Figure,
    Flip,
    MeasureIdentity,
    NullCheck,
    ReplicateSpread,
    Results,
    StatisticsUsed,
    TaskResult,
    TextResult,
)
from ensemble_server.server.compare.measures.cost import summarise as summarise_cost
from ensemble_server.server.compare.planning.blocks import PlanFile

MAIN_REPLICATE = "main"
MAX_NATS = 700.0  # per token; e to more of them is no float


def compute_results(
    file: PlanFile,
    arms: Sequence[str],
    records: Records,
    *,
    clusters: Mapping[str, Sequence[str]] | None = None,
    flips: Sequence[Flip] = (),
    notes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Results:
    """`arms`: names in the report's order, those that were made as the comparison ran included. `clusters`: measure
    ("text NAME", "task NAME") -> the cluster of each of its items, where the plan names one."""
    rules = rules_of(file, clusters or {})
    of_arms = {name: records.get(name) for name in arms}
    baseline = of_arms[file.baseline]
    counted, left_out = counted_measures(file, list(of_arms.values()))
    texts, tasks = counted.texts, counted.tasks
    mean_over: dict[Literal["text", "task"], tuple[str, ...]] = {}
    if counted.mean_texts:
        mean_over["text"] = tuple(counted.mean_texts)
    if counted.mean_tasks:
        mean_over["task"] = tuple(counted.mean_tasks)

    families: dict[str, dict[str, Unadjusted]] = {}  # measure -> arm -> its comparison with the baseline
    for name, record in of_arms.items():
        if record is baseline:
            continue
        for measure, unadjusted in comparisons(record, baseline, counted, rules):
            families.setdefault(measure, {})[name] = unadjusted
    differences = {measure: adjusted(family, rules) for measure, family in families.items()}

    def difference(measure: str, arm: str) -> Difference | None:
        return differences.get(measure, {}).get(arm)

    results = {}
    for name, record in of_arms.items():
        results[name] = ArmResult(
            kind=record.kind,
            model=record.model or name,
            members=tuple(record.members),
            description=record.description,
            text={
                text: _text_result(text, record.text[text], rules, difference(f"text {text}", name))
                for text in texts
                if has_figures(record, text)
            },
            tasks={
                task: _task_result(record.tasks[task], file, task, rules, difference(f"task {task}", name))
                for task in tasks
                if has_scores(record, task)
            },
            mean_text=_mean_text(record, counted.mean_texts, rules, difference("mean text", name)),
            mean_tasks=_mean_tasks(record, counted.mean_tasks, rules, difference("mean task", name)),
            cost=summarise_cost(record.cost, None if record is baseline else baseline.cost, level=rules.level),
            weights=record.preparation and record.preparation.weights,
            share=record.preparation and record.preparation.share,
            chosen=record.preparation and record.preparation.chosen,
            replicates=_replicates(file, name, records, texts, rules),
            skipped=_skipped(record, texts, tasks),
            error=_error(record, baseline, texts, tasks),
        )
    return Results(
        title=file.title,
        baseline=file.baseline,
        arms=results,
        texts={text: found for text in texts if (found := _text_identity(text, file, of_arms, rules)) is not None},
        tasks={task: found for task in tasks if (found := _task_identity(task, file, of_arms, rules)) is not None},
        best_of_kinds=tuple(best_of_kinds(of_arms, counted, rules)),
        win_rates=win_rates(of_arms, counted, rules),
        null_checks=tuple(_null_checks(baseline, [*of_arms.values()], texts, tasks, rules)),
        mean_over=mean_over,
        left_out=left_out,
        flips=tuple(flips),
        notes=(*notes, *_lags(differences)),
        statistics=StatisticsUsed(
            seed=rules.seed,
            num_resamples=rules.num_resamples,
            alpha=rules.alpha,
            margin_bpb=rules.margin_bpb,
            margin_score=rules.margin_score,
        ),
        provenance=dict(provenance or {}),
    )


def compute_pairs(
    file: PlanFile, arms: Sequence[str], records: Records, *, clusters: Mapping[str, Sequence[str]] | None = None
) -> Pairs:
    """Every arm against every other one, under the rules and on the measures of `compute_results`."""
    of_arms = {name: records.get(name) for name in arms}
    counted, _ = counted_measures(file, list(of_arms.values()))
    return all_pairs(of_arms, file.baseline, counted, rules_of(file, clusters or {}))


def _lags(differences: Mapping[str, Mapping[str, Difference]]) -> Iterator[str]:
    """One sentence on how much neighbouring documents resemble each other, by text; the median over the arms."""
    of_texts = {
        measure.removeprefix("text "): lags
        for measure, of_arms in differences.items()
        if measure.startswith("text ") and (lags := [one.lag for one in of_arms.values() if one.lag is not None])
    }
    if of_texts:
        told = ", ".join(f"{text} {np.median(lags):+.2f}" for text, lags in of_texts.items())
        yield (
            f"Correlation of the differences of neighbouring documents (lag, median over the arms): {told}. Where it "
            "is above zero, documents count for fewer."
        )


def _task_names(file: PlanFile) -> list[str]:
    return [task.name for task in file.tasks] + list(file.lm_eval.tasks if file.lm_eval is not None else ())


# --- one arm's figures -------------------------------------------------------------------------------------------


def _text_result(name: str, record: TextRecord, rules: Rules, difference: Difference | None) -> TextResult:
    estimate = figure_of_texts([name], {name: record}, rules)
    num_tokens = sum(record.num_tokens)
    return TextResult(
        bpb=estimate.value,
        ci=ends(estimate),
        perplexity=math.exp(per_token) if (per_token := sum(record.nats) / num_tokens) < MAX_NATS else None,
        num_documents=len(record.nats),
        num_bytes=round(sum(record.num_bytes)),
        num_tokens=round(num_tokens),
        against_baseline=difference,
    )


def _task_result(
    record: TaskRecord, file: PlanFile, name: str, rules: Rules, difference: Difference | None
) -> TaskResult:
    estimate = figure_of_tasks([name], {name: record}, rules)
    ks = next((task.pass_at for task in file.tasks if task.name == name), ())
    return TaskResult(
        metric=record.metric,
        higher_is_better=record.higher_is_better,
        score=estimate.value,
        ci=ends(estimate),
        num_items=len(record.items),
        num_missing=sum(_is_missing(item) for item in record.items),
        num_failed=sum(item.error is not None for item in record.items),
        pass_at_k={k: float(np.mean([_pass_at(item, k) for item in record.items])) for k in ks},
        against_baseline=difference,
    )


def _is_missing(item: ItemRecord) -> bool:
    return item.error is None and bool(item.answers) and all(answer is None for answer in item.answers)


def _pass_at(item: ItemRecord, k: int) -> float:
    """A sample that failed is a wrong one; an item of which nothing came is wrong for every k."""
    num_samples = len(item.sample_scores)
    if num_samples < k:
        return 0.0
    return pass_at_k(num_samples, sum(score == 1.0 for score in item.sample_scores), k)


def _mean_text(record: ArmRecord, texts: Sequence[str], rules: Rules, difference: Difference | None) -> Figure | None:
    if not texts or not all(has_figures(record, text) for text in texts):
        return None
    estimate = figure_of_texts(texts, record.text, rules)
    return Figure(value=estimate.value, ci=ends(estimate), against_baseline=difference)


def _mean_tasks(record: ArmRecord, tasks: Sequence[str], rules: Rules, difference: Difference | None) -> Figure | None:
    if not tasks or not all(has_scores(record, task) for task in tasks):
        return None
    estimate = figure_of_tasks(tasks, record.tasks, rules)
    return Figure(value=estimate.value, ci=ends(estimate), against_baseline=difference)


def counted_measures(file: PlanFile, records: Sequence[ArmRecord]) -> tuple[Counted, dict[str, str]]:
    """What means are taken over: texts and tasks that all arms have which have any; and why the others are left out.

    Texts that switch between others are made of them, and have no part in a mean with them.
    """
    texts, tasks = list(file.text), _task_names(file)
    left_out: dict[str, str] = {}
    mean_texts = [name for name in texts if not file.text[name].switching]
    if mean_texts and len(mean_texts) < len(texts):
        left_out |= {f"text {name}": "is made of the other texts" for name in texts if name not in mean_texts}
    mean_tasks = list(tasks)
    for name in tasks:
        if any(has_scores(record, name) and not record.tasks[name].higher_is_better for record in records):
            mean_tasks.remove(name)
            others = ", the others high" if len(tasks) > 1 else ""
            left_out[f"task {name}"] = f"is better low{others}"
    mean_texts = _of_all(mean_texts or texts, "text", records, has_figures, left_out)
    mean_tasks = _of_all(mean_tasks, "task", records, has_scores, left_out)
    return Counted(texts, tasks, mean_texts, mean_tasks), left_out


def _of_all(
    measures: Sequence[str],
    family: str,
    records: Sequence[ArmRecord],
    has: Callable[[ArmRecord, str], bool],
    left_out: dict[str, str],
) -> list[str]:
    """The measures that every arm has which has any of them, failed ones apart; notes why others are left out."""
    taking_part = [
        record for record in records if record.failure is None and any(has(record, name) for name in measures)
    ]
    shared = []
    for name in measures:
        lacking = [record for record in taking_part if not has(record, name)]
        if taking_part and not lacking:
            shared.append(name)
        elif lacking:
            of_measure = lacking[0].text.get(name) if family == "text" else lacking[0].tasks.get(name)
            reason = (of_measure.skipped if of_measure is not None else None) or "it was not measured"
            others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            verb = "have" if len(lacking) > 1 else "has"
            left_out[f"{family} {name}"] = f"{lacking[0].name}{others} {verb} no figure: {reason}"
    return shared


def _replicates(
    file: PlanFile, arm: str, records: Records, texts: Sequence[str], rules: Rules
) -> dict[str, ReplicateSpread]:
    spreads = {}
    for text in texts:
        rows: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        for replicate in (None, *file.replicates):
            ours, theirs = records.get(arm, replicate), records.get(file.baseline, replicate)
            if not (has_figures(ours, text) and has_figures(theirs, text)):
                continue
            if same_texts(ours.text[text], theirs.text[text]):
                columns = (*text_columns(ours.text[text]), *text_columns(theirs.text[text]))
                rows[replicate or MAIN_REPLICATE] = columns
        if len(rows) < 2:
            continue
        values = {name: float(bits.sum() / size.sum()) for name, (bits, size, _, _) in rows.items()}
        differences = {
            name: values[name] - float(their_bits.sum() / their_size.sum())
            for name, (_, _, their_bits, their_size) in rows.items()
        }
        ours, size, theirs, their_size = (np.stack(column) for column in zip(*rows.values(), strict=True))
        measure = f"text {text}"
        estimate = crossed_ratio_difference(
            ours,
            size,
            theirs,
            their_size,
            clusters=rules.clusters.get(measure),
            are_neighbours=measure in rules.neighbours,
            level=rules.level,
        )
        spreads[text] = ReplicateSpread(
            values=values,
            differences=differences,
            mean=estimate.value,
            spread=float(np.std(list(differences.values()), ddof=1)),
            ci=ends(estimate),
        )
    return spreads


def _skipped(record: ArmRecord, texts: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    skipped = {f"text {text}": record.text[text].skipped for text in texts if text in record.text}
    skipped |= {f"task {task}": record.tasks[task].skipped for task in tasks if task in record.tasks}
    skipped["cost"] = record.cost.skipped if record.cost is not None else None
    return {measure: reason for measure, reason in skipped.items() if reason is not None}


def _error(record: ArmRecord, baseline: ArmRecord, texts: Sequence[str], tasks: Sequence[str]) -> str | None:
    """Why the arm's row is not whole: it failed, or was given something else than the baseline was."""
    if record.failure is not None:
        return f"{record.failure.stage}: {record.failure.message}"
    for text in texts:
        is_known = has_figures(record, text) and has_figures(baseline, text)
        if is_known and not same_texts(record.text[text], baseline.text[text]):
            return f"text {text}: its documents are not those of the baseline"
    for task in tasks:
        ours, theirs = record.tasks.get(task), baseline.tasks.get(task)
        if ours is None or theirs is None or ours.skipped or theirs.skipped:
            continue
        if not same_items(ours, theirs):
            return f"task {task}: its items or prompts are not those of the baseline"
    return None


# --- what every arm was given ------------------------------------------------------------------------------------


def _text_identity(text: str, file: PlanFile, records: Mapping[str, ArmRecord], rules: Rules) -> MeasureIdentity | None:
    known = next((record.text[text] for record in records.values() if has_figures(record, text)), None)
    if known is None:
        return None
    source = file.text[text]
    return MeasureIdentity(
        num_items=len(known.nats),
        sha256=known.items_sha256,
        source=source.path.rsplit("/", 1)[-1] if source.path else f"switching between {', '.join(source.switching)}",
        clusters=_numbered(rules.clusters.get(f"text {text}")),
    )


def _task_identity(task: str, file: PlanFile, records: Mapping[str, ArmRecord], rules: Rules) -> MeasureIdentity | None:
    known = next((record.tasks[task] for record in records.values() if has_scores(record, task)), None)
    if known is None:
        return None
    source = next((source.data.rsplit("/", 1)[-1] for source in file.tasks if source.name == task), "lm_eval")
    return MeasureIdentity(
        num_items=len(known.items),
        sha256=known.items_sha256,
        source=source,
        metric=known.metric,
        clusters=_numbered(rules.clusters.get(f"task {task}")),
    )


def _numbered(clusters: Sequence[str] | None) -> tuple[int, ...] | None:
    """["a", "b", "a"] -> (0, 1, 0)"""
    if clusters is None:
        return None
    place = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return tuple(place[name] for name in clusters)


def _null_checks(
    baseline: ArmRecord, records: Sequence[ArmRecord], texts: Sequence[str], tasks: Sequence[str], rules: Rules
) -> Iterator[NullCheck]:
    for text in texts:
        again = baseline.null_text.get(text)
        if has_figures(baseline, text) and again is not None and again.skipped is None:
            compared = compare_texts([text], {text: scored_columns(baseline.text[text], again)}, rules)
            yield null_check(f"text {text}", "the same model, windows half a window later", compared, alpha=rules.alpha)
        if f"text {text}" in rules.neighbours:
            influences = [
                influence_on_difference(*scored_columns(record.text[text], baseline.text[text]))
                for record in records
                if record is not baseline and has_figures(record, text) and has_figures(baseline, text)
                if same_texts(record.text[text], baseline.text[text])
            ]
            if (check := check_of_neighbours(f"text {text}", influences, alpha=rules.alpha)) is not None:
                yield check
    for task in tasks:
        ours, again = baseline.tasks.get(task), baseline.null_tasks.get(task)
        if ours is not None and again is not None and same_items(ours, again):
            compared = compare_task(task, ours, again, rules)
            yield null_check(f"task {task}", "a second run with other seeds", compared, alpha=rules.alpha)
