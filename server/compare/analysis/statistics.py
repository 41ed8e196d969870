"""From records to results: every arm's figures, with intervals. No model and no clock: same in, same out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.pass_at_k import pass_at_k
from ensemble_server.ensembles.comparison.proportions import wilson
from ensemble_server.ensembles.comparison.replicates import crossed_ratio_difference
from ensemble_server.server.compare.analysis.null_check import null_check_of_task, null_check_of_text
from ensemble_server.server.compare.analysis.pairing import (
    Rules,
    Unadjusted,
    adjusted,
    compare_task,
    comparisons,
    ends,
    has_figures,
    is_right_or_wrong,
    rules_of,
    same_items,
    same_texts,
    scores_of,
    text_columns,
)
from ensemble_server.server.compare.measures.cost import summarise as summarise_cost
from ensemble_server.server.compare.planning.blocks import PlanFile
from ensemble_server.server.compare.results import (
    ArmResult,
    Difference,
    Figure,
    Flip,
    Interval,
    MeasureIdentity,
    NullCheck,
    ReplicateSpread,
    Results,
    StatisticsUsed,
    TaskResult,
    TextResult,
)
from ensemble_server.server.compare.running.records import ArmRecord, ItemRecord, Records, TaskRecord, TextRecord

MAIN_REPLICATE = "main"


def compute_results(
    file: PlanFile,
    arms: Sequence[str],
    records: Records,
    *,
    flips: Sequence[Flip] = (),
    notes: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Results:
    """`arms`: names in the report's order, those that were made as the comparison ran included."""
    rules = rules_of(file)
    of_arms = {name: records.get(name) for name in arms}
    baseline = of_arms[file.baseline]
    texts, tasks = list(file.text), _task_names(file)
    plain_texts = [name for name in texts if not file.text[name].switching] or texts

    families: dict[str, dict[str, Unadjusted]] = {}  # measure -> arm -> its comparison with the baseline
    for name, record in of_arms.items():
        if record is baseline:
            continue
        for measure, unadjusted in comparisons(record, baseline, texts, plain_texts, tasks, rules):
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
                text: _text_result(record.text[text], rules, difference(f"text {text}", name))
                for text in texts
                if has_figures(record, text)
            },
            tasks={
                task: _task_result(record.tasks[task], file, task, rules, difference(f"task {task}", name))
                for task in tasks
                if task in record.tasks and record.tasks[task].skipped is None
            },
            mean_text=_mean_text(record, plain_texts, rules, difference("mean text", name)),
            mean_tasks=_mean_tasks(record, tasks, rules, difference("mean task", name)),
            cost=summarise_cost(record.cost, seed=rules.seed, level=rules.level),
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
        texts={text: identity for text in texts if (identity := _text_identity(text, file, of_arms)) is not None},
        tasks={task: identity for task in tasks if (identity := _task_identity(task, file, of_arms)) is not None},
        null_checks=tuple(_null_checks(baseline, texts, tasks, rules)),
        flips=tuple(flips),
        notes=tuple(notes),
        statistics=StatisticsUsed(
            seed=rules.seed,
            num_resamples=rules.num_resamples,
            alpha=rules.alpha,
            margin_bpb=rules.margin_bpb,
            margin_score=rules.margin_score,
        ),
        provenance=dict(provenance or {}),
    )


def _task_names(file: PlanFile) -> list[str]:
    return [task.name for task in file.tasks] + list(file.lm_eval.tasks if file.lm_eval is not None else ())


# --- one arm's figures -------------------------------------------------------------------------------------------


def _text_result(record: TextRecord, rules: Rules, difference: Difference | None) -> TextResult:
    bits, num_bytes = text_columns(record)
    estimate = bootstrap.ratio(bits, num_bytes, **rules.sampling)
    num_tokens = sum(record.num_tokens)
    return TextResult(
        bpb=estimate.value,
        ci=ends(estimate),
        perplexity=math.exp(sum(record.nats) / num_tokens),
        num_documents=len(record.nats),
        num_bytes=round(sum(record.num_bytes)),
        num_tokens=round(num_tokens),
        against_baseline=difference,
    )


def _task_result(
    record: TaskRecord, file: PlanFile, name: str, rules: Rules, difference: Difference | None
) -> TaskResult:
    scores = scores_of(record)
    if is_right_or_wrong(scores):
        share = wilson(int(scores.sum()), len(scores), level=rules.level)
        ci: Interval | None = (share.low, share.high)
    else:
        ci = ends(bootstrap.mean(scores, **rules.sampling))
    ks = next((task.pass_at for task in file.tasks if task.name == name), ())
    return TaskResult(
        metric=record.metric,
        higher_is_better=record.higher_is_better,
        score=float(scores.mean()),
        ci=ci,
        num_items=len(scores),
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
    if len(texts) < 2 or not all(has_figures(record, text) for text in texts):
        return None
    estimate = bootstrap.macro_ratio([text_columns(record.text[text]) for text in texts], **rules.sampling)
    return Figure(value=estimate.value, ci=ends(estimate), against_baseline=difference)


def _mean_tasks(record: ArmRecord, tasks: Sequence[str], rules: Rules, difference: Difference | None) -> Figure | None:
    known = [record.tasks[task] for task in tasks if task in record.tasks and record.tasks[task].skipped is None]
    if len(tasks) < 2 or len(known) < len(tasks):
        return None
    columns = [(scores_of(task), np.ones(len(task.items))) for task in known]
    estimate = bootstrap.macro_ratio(columns, **rules.sampling)
    return Figure(value=estimate.value, ci=ends(estimate), against_baseline=difference)


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
        stacked = [np.stack(column) for column in zip(*rows.values(), strict=True)]
        estimate = crossed_ratio_difference(*stacked, **rules.sampling)
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
        is_known = ours is not None and theirs is not None and not (ours.skipped or theirs.skipped)
        if is_known and not same_items(ours, theirs):
            return f"task {task}: its items or prompts are not those of the baseline"
    return None


# --- what every arm was given ------------------------------------------------------------------------------------


def _text_identity(text: str, file: PlanFile, records: Mapping[str, ArmRecord]) -> MeasureIdentity | None:
    known = next((record.text[text] for record in records.values() if has_figures(record, text)), None)
    if known is None:
        return None
    source = file.text[text]
    return MeasureIdentity(
        num_items=len(known.nats),
        sha256=known.items_sha256,
        source=source.path.rsplit("/", 1)[-1] if source.path else f"switching between {', '.join(source.switching)}",
    )


def _task_identity(task: str, file: PlanFile, records: Mapping[str, ArmRecord]) -> MeasureIdentity | None:
    is_known: Callable[[ArmRecord], bool] = lambda record: (  # noqa: E731
        task in record.tasks and record.tasks[task].skipped is None
    )
    known = next((record.tasks[task] for record in records.values() if is_known(record)), None)
    if known is None:
        return None
    source = next((source.data.rsplit("/", 1)[-1] for source in file.tasks if source.name == task), "lm_eval")
    return MeasureIdentity(num_items=len(known.items), sha256=known.items_sha256, source=source, metric=known.metric)


def _null_checks(baseline: ArmRecord, texts: Sequence[str], tasks: Sequence[str], rules: Rules) -> list[NullCheck]:
    checks = []
    for text in texts:
        if has_figures(baseline, text):
            bits, num_bytes = text_columns(baseline.text[text])
            check = null_check_of_text(text, bits, num_bytes, seed=rules.seed, alpha=rules.alpha)
            checks += [check] if check is not None else []
    for task in tasks:
        ours, again = baseline.tasks.get(task), baseline.null_tasks.get(task)
        if ours is not None and again is not None and same_items(ours, again):
            checks.append(null_check_of_task(task, compare_task(ours, again, rules), alpha=rules.alpha))
    return checks
