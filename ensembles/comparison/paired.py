"""A model against a baseline on the same items, all that a report says of it: estimate, test, effect size, counts.

Three kinds of figures are told apart: right or wrong (0/1), real scores (ROUGE, chrF, the mean of several samples), and
costs per length (nats per document of so many bytes: bits per byte).

Items that are not independent are said to be so: `clusters` names the cluster of each item (the passage that a question
is on, the author of a document), `are_neighbours` says that documents were cut out of one text and stand in its order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.bootstrap import NUM_RESAMPLES
from ensemble_server.ensembles.comparison.dependence import Dependence, design_effect, independent, of_neighbours
from ensemble_server.ensembles.comparison.draws import without_rounding
from ensemble_server.ensembles.comparison.effect_size import cohens_d_z, cohens_h, discordant_odds
from ensemble_server.ensembles.comparison.intervals import Estimate, Interval
from ensemble_server.ensembles.comparison.power import OfClusters, OfMean, OfRightWrong, Sensitivity
from ensemble_server.ensembles.comparison.proportions import tango
from ensemble_server.ensembles.comparison.significance import (
    McNemar,
    Spread,
    combined,
    mcnemar,
    sign_flip,
    smallest_mcnemar_p,
    smallest_sign_flip_p,
    student_t,
)

Test = Literal["mcnemar", "sign_flip", "student_t"]
MIN_UNITS = 5  # documents, below which Student's test rests on a spread that nobody knows
FEW_DIFFERING = 6  # items on which scores differ, below which a bootstrap of them knows nothing of the others
FEW_UNITS = 30  # below, Student's interval holds better than the bootstrap's (docs/statistics.md)
ROUNDING = 1e-12  # relative: smaller differences are those of rounding
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Numerators and denominators of the model, then of the baseline; (num_items,) each, denominators above zero."""


@dataclass(frozen=True)
class Comparison:
    """Model less baseline. `effect_size` is Cohen's h for right and wrong, d_z for real figures (see `effect_size`).

    `sensitivity`: what this test on these items can see; `smallest_p_value`: that it can give on them at all. `wins`,
    `losses`, `ties`: items on which the model is better, worse or equal. `lag`: correlation of the differences of
    neighbours, where they were looked at. `mcnemar`, `odds`: for right and wrong only.
    """

    difference: Estimate
    test: Test
    p_value: float
    effect_size: float
    effect_size_name: Literal["cohens_h", "cohens_d_z"]
    sensitivity: Sensitivity | None
    smallest_p_value: float
    wins: int
    losses: int
    ties: int
    lag: float | None = None
    mcnemar: McNemar | None = None
    odds: float | None = None

    def detectable(self, *, alpha: float = 0.05, num_comparisons: int = 1) -> float | None:
        """The smallest true difference that shows in four of five such comparisons; None if none can."""
        if self.sensitivity is None:
            return None
        return self.sensitivity.detectable(alpha=alpha, num_comparisons=num_comparisons)


def compare_right_wrong(
    model: np.ndarray,
    baseline: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """Both (num_items,) of 0 and 1; failed and missing items count as 0. The difference is one of shares.

    The interval is Tango's score interval, the test McNemar's; with `clusters`, whose items are not independent, all
    counts are divided by their design effect first, the interval's tails are Student's, and whole clusters' signs are
    flipped. `num_resamples` serves the standard error alone.
    """
    model, baseline = _aligned(model, baseline)
    assert np.isin([model, baseline], (0.0, 1.0)).all(), "right or wrong: every figure must be 0 or 1"
    differences = model - baseline
    drawn = bootstrap.mean(differences, clusters=clusters, seed=seed, num_resamples=num_resamples, level=level)
    counts = mcnemar(model == 1, baseline == 1)
    effect = 1.0 if clusters is None else design_effect(differences, clusters)
    divided = counts.only_model + counts.only_baseline
    interval = _interval_of_few(differences, clusters, level)
    test: Test = "mcnemar"
    p_value, smallest = counts.p_value, smallest_mcnemar_p(len(model))
    sensitivity: Sensitivity | None = OfRightWrong(len(model) / effect, divided / effect)
    if clusters is not None:
        test, per_cluster = "sign_flip", _per_cluster(differences, clusters)
        p_value, smallest = sign_flip(per_cluster, seed=seed), smallest_sign_flip_p(len(per_cluster))
        of_mean = _of_mean(drawn, max(len(per_cluster) - 1.0, 1.0), smallest)
        sensitivity = of_mean and OfClusters(of_mean, OfRightWrong(len(model) / effect, divided / effect))
    return Comparison(
        Estimate(drawn.value, None if len(model) < 2 else interval, drawn.standard_error, drawn.num_units),
        test,
        p_value,
        cohens_h(float(model.mean()), float(baseline.mean())),
        "cohens_h",
        sensitivity,
        smallest,
        counts.only_model,
        counts.only_baseline,
        len(model) - divided,
        mcnemar=counts,
        odds=discordant_odds(counts.only_model, counts.only_baseline),
    )


def compare_scores(
    model: np.ndarray,
    baseline: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """Both (num_items,) or (num_items, num_samples), higher is better; samples are averaged within their item.

    Scores from 0 to 1 that agree on all items but a few have the interval of right and wrong answers that do: so few
    items may hide those on which they would not.
    """
    model, baseline = _aligned(bootstrap.within_item(model), bootstrap.within_item(baseline))
    differences = model - baseline
    difference = bootstrap.mean(differences, clusters=clusters, seed=seed, num_resamples=num_resamples, level=level)
    is_few = np.count_nonzero(differences) < FEW_DIFFERING and np.abs(differences).max() <= 1
    if is_few and difference.interval is not None:
        difference = replace(difference, interval=_interval_of_few(differences, clusters, level))
    per_cluster = _per_cluster(differences, clusters)
    smallest = smallest_sign_flip_p(len(per_cluster))
    return Comparison(
        difference,
        "sign_flip",
        sign_flip(per_cluster, seed=seed),
        cohens_d_z(differences),
        "cohens_d_z",
        _of_mean(difference, max(len(per_cluster) - 1.0, 1.0), smallest),
        smallest,
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        int((differences == 0).sum()),
    )


def compare_bits_per_byte(
    nats: np.ndarray,
    num_bytes: np.ndarray,
    baseline_nats: np.ndarray,
    baseline_num_bytes: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    are_neighbours: bool = False,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """All (num_documents,), lower is better: wins are documents with fewer bits per byte.

    Ratio of sums, so that long documents count for more. The test is Student's on what each document adds to the
    difference of the two ratios. Documents without a scored token are ties.
    """
    nats, baseline_nats = _aligned(nats, baseline_nats)
    num_bytes, baseline_num_bytes = _aligned(num_bytes, baseline_num_bytes)
    scored = (num_bytes > 0) & (baseline_num_bytes > 0)  # a document of one token has nothing to predict
    bits = math.log(2)
    columns = (nats[scored] / bits, num_bytes[scored], baseline_nats[scored] / bits, baseline_num_bytes[scored])
    found = compare_ratios(
        [columns],
        clusters=None if clusters is None else [[one for one, kept in zip(clusters, scored, strict=True) if kept]],
        are_neighbours=[are_neighbours],
        higher_is_better=False,
        seed=seed,
        num_resamples=num_resamples,
        level=level,
    )
    return _with_ties(found, int((~scored).sum()))


def compare_ratios(
    domains: Sequence[Columns],
    *,
    higher_is_better: bool,
    clusters: Sequence[Sequence[object] | None] | None = None,
    are_neighbours: Sequence[bool] = (),
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """The mean over domains of each domain's difference of two ratios of sums. Wins and losses are of all domains.

    `clusters`, `are_neighbours`: one for each domain. The test is Student's. So is the interval with fewer than
    FEW_UNITS items in a domain; else it is the bootstrap's, drawn within each domain and stretched by what dependence
    makes of the standard error and its tails.
    """
    grouped = [None] * len(domains) if clusters is None else list(clusters)
    ordered = [*are_neighbours, *[False] * (len(domains) - len(are_neighbours))]
    summed = [
        tuple(bootstrap.by_cluster(np.column_stack(columns), group).T)
        for columns, group in zip(domains, grouped, strict=True)
    ]
    influences = [influence_on_difference(*columns) / len(domains) for columns in summed]
    dependences = [
        of_neighbours(influence) if are and group is None else independent(len(influence))
        for influence, are, group in zip(influences, ordered, grouped, strict=True)
    ]
    fewest, num_units = min(map(len, influences)), sum(map(len, influences))
    if fewest >= FEW_UNITS:
        difference = bootstrap.macro_ratio_difference(summed, seed=seed, num_resamples=num_resamples, level=level)
    else:
        sums = [[column.sum() for column in columns] for columns in summed]
        gaps = [ours / size - theirs / their_size for ours, size, theirs, their_size in sums]
        difference = Estimate(float(np.mean(gaps)), None, None, num_units)
    p_value, smallest, sensitivity = 1.0, 1.0, None
    if fewest >= 2:
        spread = combined([spread_of(one, how) for one, how in zip(influences, dependences, strict=True)])
        scale = max(float(np.abs(columns[0]).sum() / columns[1].sum()) for columns in summed)
        if spread.standard_error <= ROUNDING * scale and abs(difference.value) <= ROUNDING * scale:
            spread, difference = Spread(0.0, spread.freedom), replace(difference, value=0.0)
        if fewest < FEW_UNITS:
            difference = _with_student_interval(difference, spread, level)
        elif max(how.design_effect for how in dependences) > 1:
            plain = combined([spread_of(one, independent(len(one))) for one in influences])
            difference = difference.stretched(*stretch(plain, spread, level))
        p_value = student_t(difference.value, spread.standard_error, spread.freedom)
        if fewest >= MIN_UNITS:
            smallest, sensitivity = 0.0, OfMean(spread.standard_error, spread.freedom)
    per_item = np.concatenate(
        [
            without_rounding(ours / size - theirs / their_size, theirs / their_size)
            for ours, size, theirs, their_size in domains
        ]
    )
    better = per_item > 0 if higher_is_better else per_item < 0
    num_ties = int((per_item == 0).sum())
    lags = [how.lag for how in dependences if how.lag is not None]
    return Comparison(
        difference,
        "student_t",
        p_value,
        cohens_d_z(per_item),
        "cohens_d_z",
        sensitivity,
        smallest,
        int(better.sum()),
        len(per_item) - int(better.sum()) - num_ties,
        num_ties,
        lag=max(lags, default=None),
    )


def mean_of_tasks(
    compared: Sequence[Comparison],
    differences: Sequence[np.ndarray],
    *,
    clusters: Sequence[Sequence[object] | None],
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """The mean of several tasks' differences, each counted alike. `differences`: (num_items,) of each task.

    The interval puts the tasks' own together by their squares (MOVER: Zou & Donner 2008), so that it keeps what they
    do for few items and for items that are all answered alike. The test flips signs over the items of all tasks.
    """
    num_tasks = len(compared)
    value = float(np.mean([one.difference.value for one in compared]))
    errors = [one.difference.standard_error for one in compared]
    error = None if None in errors else math.sqrt(sum(each**2 for each in errors if each is not None)) / num_tasks
    ends = [one.difference.interval for one in compared if one.difference.interval is not None]
    interval = None
    if len(ends) == num_tasks:
        values = [one.difference.value for one in compared]
        low, high = (
            math.sqrt(sum((middle - getattr(each, end)) ** 2 for middle, each in zip(values, ends, strict=True)))
            for end in ("low", "high")
        )
        interval = Interval(value - low / num_tasks, value + high / num_tasks, level, ends[0].method)
    shares = np.concatenate(
        [_per_cluster(each / len(each) / num_tasks, group) for each, group in zip(differences, clusters, strict=True)]
    )
    smallest = smallest_sign_flip_p(len(shares))
    estimate = Estimate(value, interval, error, len(shares))
    return Comparison(
        estimate,
        "sign_flip",
        sign_flip(shares, seed=seed),
        cohens_d_z(np.concatenate(list(differences))),
        "cohens_d_z",
        _of_mean(estimate, max(len(shares) - num_tasks, 1.0), smallest),
        smallest,
        sum(one.wins for one in compared),
        sum(one.losses for one in compared),
        sum(one.ties for one in compared),
    )


def influence_on_difference(
    ours: np.ndarray, size: np.ndarray, theirs: np.ndarray, their_size: np.ndarray
) -> np.ndarray:
    """What each item adds to the error of Σours / Σsize - Σtheirs / Σtheir_size, to first order: (num_items,)."""
    total, their_total = size.sum(), their_size.sum()
    return (ours - ours.sum() / total * size) / total - (theirs - theirs.sum() / their_total * their_size) / their_total


def spread_of(influence: np.ndarray, dependence: Dependence) -> Spread:
    """Of a figure to which each item adds `influence`, (num_items,) of sum zero, at least two."""
    num = len(influence)
    plain = math.sqrt(num / (num - 1) * float(influence @ influence))
    return Spread(plain * dependence.error_factor, dependence.freedom)


def _with_student_interval(difference: Estimate, spread: Spread, level: float) -> Estimate:
    half = spread.standard_error * float(stdtrit(spread.freedom, (1 + level) / 2))
    interval = Interval(difference.value - half, difference.value + half, level, "student")
    return Estimate(difference.value, interval, spread.standard_error, difference.num_units)


def stretch(plain: Spread, spread: Spread, level: float) -> tuple[float, float]:
    """By how much the ends of an interval, and its standard error, grow."""
    error = spread.standard_error / plain.standard_error if plain.standard_error > 0 else 1.0
    tail = (1 + level) / 2
    return error * float(stdtrit(spread.freedom, tail) / stdtrit(plain.freedom, tail)), error


def _interval_of_few(differences: np.ndarray, clusters: Sequence[object] | None, level: float) -> Interval:
    """Tango's, of differences from -1 to 1: broken ones count for so much of an item that divides the models, which
    makes their variance no smaller than it is."""
    effect, freedom = 1.0, None
    if clusters is not None:
        effect, freedom = design_effect(differences, clusters), max(len(set(clusters)) - 1, 1)
    gains, losses = float(differences[differences > 0].sum()), float(-differences[differences < 0].sum())
    return tango(gains / effect, losses / effect, len(differences) / effect, level=level, freedom=freedom)


def _with_ties(found: Comparison, num: int) -> Comparison:
    return replace(found, ties=found.ties + num)


def _aligned(model: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model, baseline = np.asarray(model, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if model.shape != baseline.shape:
        raise ValueError(f"paired figures must be of the same items; there are {model.shape} and {baseline.shape}")
    return model, baseline


def _per_cluster(differences: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    return bootstrap.by_cluster(differences[:, None], clusters)[:, 0]


def _of_mean(difference: Estimate, freedom: float, smallest_p: float) -> OfMean | None:
    error = difference.standard_error
    return None if error is None else OfMean(error, freedom, smallest_p)
