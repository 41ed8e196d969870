"""An arm against the baseline on the same items, measure by measure: the pairs, the tests, the verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.intervals import Estimate
from ensemble_server.ensembles.comparison.paired import (
    Comparison,
    compare_bits_per_byte,
    compare_right_wrong,
    compare_scores,
)
from ensemble_server.ensembles.comparison.power import minimal_detectable_effect
from ensemble_server.ensembles.comparison.significance import holm, sign_flip
from ensemble_server.ensembles.comparison.verdict import verdict
from ensemble_server.server.compare.planning.blocks import PlanFile
from ensemble_server.server.compare.results import Difference, Interval
from ensemble_server.server.compare.running.records import ArmRecord, TaskRecord, TextRecord


@dataclass(frozen=True)
class Rules:
    """The plan's statistics, as the functions of `ensembles.comparison` take them."""

    seed: int
    num_resamples: int
    alpha: float
    margin_bpb: float
    margin_score: float

    @property
    def level(self) -> float:
        return 1 - self.alpha

    @property
    def sampling(self) -> dict[str, Any]:
        return {"seed": self.seed, "num_resamples": self.num_resamples, "level": self.level}


@dataclass(frozen=True)
class Unadjusted:
    """A comparison before Holm's correction. `margin`: the smallest difference that matters."""

    comparison: Comparison
    margin: float
    higher_is_better: bool


def rules_of(file: PlanFile) -> Rules:
    chosen = file.statistics
    return Rules(chosen.seed, chosen.resamples, chosen.alpha, chosen.margin_bpb, chosen.margin_score)


# --- columns -----------------------------------------------------------------------------------------------------


def has_figures(record: ArmRecord, text: str) -> bool:
    return text in record.text and record.text[text].skipped is None


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


def comparisons(
    record: ArmRecord,
    baseline: ArmRecord,
    texts: Sequence[str],
    plain_texts: Sequence[str],
    tasks: Sequence[str],
    rules: Rules,
) -> list[tuple[str, Unadjusted]]:
    found: list[tuple[str, Unadjusted]] = []
    pairs = {}
    for text in texts:
        if has_figures(record, text) and has_figures(baseline, text):
            ours, theirs = record.text[text], baseline.text[text]
            if not same_texts(ours, theirs):
                continue
            pairs[text] = (*text_columns(ours), *text_columns(theirs))
            compared = _compare_text(*pairs[text], rules)
            found.append((f"text {text}", Unadjusted(compared, rules.margin_bpb, higher_is_better=False)))
    if len(plain_texts) > 1 and all(text in pairs for text in plain_texts):
        columns = [_scored(*pairs[text]) for text in plain_texts]
        compared = _compare_means(columns, rules, higher_is_better=False)
        found.append(("mean text", Unadjusted(compared, rules.margin_bpb, higher_is_better=False)))
    task_columns = []
    for task in tasks:
        ours, theirs = record.tasks.get(task), baseline.tasks.get(task)
        if ours is None or theirs is None or ours.skipped or theirs.skipped or not same_items(ours, theirs):
            continue
        compared = compare_task(ours, theirs, rules)
        found.append((f"task {task}", Unadjusted(compared, rules.margin_score, ours.higher_is_better)))
        ones = np.ones(len(ours.items))
        task_columns.append((scores_of(ours), ones, scores_of(theirs), ones))
    if len(tasks) > 1 and len(task_columns) == len(tasks):
        compared = _compare_means(task_columns, rules, higher_is_better=True)
        found.append(("mean task", Unadjusted(compared, rules.margin_score, higher_is_better=True)))
    return found


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _scored(bits: np.ndarray, num_bytes: np.ndarray, their_bits: np.ndarray, their_bytes: np.ndarray) -> Columns:
    """Without documents of which a model scored no token (shorter than one)."""
    kept = (num_bytes > 0) & (their_bytes > 0)
    return bits[kept], num_bytes[kept], their_bits[kept], their_bytes[kept]


def _compare_text(
    bits: np.ndarray, num_bytes: np.ndarray, their_bits: np.ndarray, their_bytes: np.ndarray, rules: Rules
) -> Comparison:
    bits, num_bytes, their_bits, their_bytes = _scored(bits, num_bytes, their_bits, their_bytes)
    nats, their_nats = bits * math.log(2), their_bits * math.log(2)
    return compare_bits_per_byte(nats, num_bytes, their_nats, their_bytes, **rules.sampling)


def compare_task(ours: TaskRecord, theirs: TaskRecord, rules: Rules) -> Comparison:
    scores, their_scores = scores_of(ours), scores_of(theirs)
    if not ours.higher_is_better:
        compared = compare_scores(scores, their_scores, **rules.sampling)
        return replace(compared, wins=compared.losses, losses=compared.wins)
    if is_right_or_wrong(scores) and is_right_or_wrong(their_scores):
        return compare_right_wrong(scores, their_scores, **rules.sampling)
    return compare_scores(scores, their_scores, **rules.sampling)


def is_right_or_wrong(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _compare_means(domains: Sequence[Columns], rules: Rules, *, higher_is_better: bool) -> Comparison:
    """The mean over domains of each domain's figure. Wins and losses are items of all domains."""
    difference = bootstrap.macro_ratio_difference(domains, **rules.sampling)
    # Linearised, so that all items' shares add up to the difference of the means.
    shares = np.concatenate(
        [(ours / size.sum() - theirs / their_size.sum()) / len(domains) for ours, size, theirs, their_size in domains]
    )
    per_item = np.concatenate([ours / size - theirs / their_size for ours, size, theirs, their_size in domains])
    better = per_item > 0 if higher_is_better else per_item < 0
    num_ties = int((per_item == 0).sum())
    num_wins = int(better.sum())
    error = difference.standard_error
    spread = float(per_item.std(ddof=1)) if len(per_item) > 1 else 0.0
    return Comparison(
        difference,
        "sign_flip",
        sign_flip(shares, seed=rules.seed),
        float(per_item.mean()) / spread if spread else 0.0,
        "cohens_d_z",
        None if error is None else minimal_detectable_effect(error, level=rules.level),
        num_wins,
        len(per_item) - num_wins - num_ties,
        num_ties,
    )


def adjusted(family: Mapping[str, Unadjusted], rules: Rules) -> dict[str, Difference]:
    adjusted = holm([unadjusted.comparison.p_value for unadjusted in family.values()])
    return {
        arm: _difference(unadjusted, p_holm, rules)
        for (arm, unadjusted), p_holm in zip(family.items(), adjusted, strict=True)
    }


def _difference(unadjusted: Unadjusted, p_holm: float, rules: Rules) -> Difference:
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
            alpha=rules.alpha,
        ),
        effect_size=compared.effect_size if math.isfinite(compared.effect_size) else None,
        effect_size_name=compared.effect_size_name,
        detectable=compared.minimal_detectable_effect,
        wins=compared.wins,
        ties=compared.ties,
        losses=compared.losses,
    )


def ends(estimate: Estimate) -> Interval | None:
    return estimate.interval and (estimate.interval.low, estimate.interval.high)
