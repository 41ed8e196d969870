"""What the report says, as text in tables: the same for HTML and Markdown. Nothing here is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble_server.ensembles.comparison.draws import ROUNDING
from ensemble_server.server.compare.kept.results import ArmResult, Flip, Results, Timing
from ensemble_server.server.compare.report import words
from ensemble_server.server.compare.report.families import Family, Quality, families
from ensemble_server.server.compare.report.headline import BEST, gain, gain_interval, headline


@dataclass(frozen=True)
class Table:
    """A row that is shorter than `columns` ends in a cell that takes their place. A cell may have several lines.

    `head`: the place of the column that names the row.
    """

    title: str
    explanation: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    head: int = 0


@dataclass(frozen=True)
class Report:
    """`headline`: the best of each kind, a sentence each; `summary`: paragraphs; `quality`, `details`: tables of
    results and of how they came to be; `flips`: by arm."""

    title: str
    baseline: str
    headline: Sequence[str]
    summary: Sequence[str]
    quality: Sequence[Table]
    cost: Table | None
    details: Sequence[Table]
    failures: Sequence[tuple[str, str]]
    notes: Sequence[str]
    flips: Mapping[str, Sequence[Flip]]
    command: str | None
    reading: Sequence[str]


def contents(results: Results) -> Report:
    kinds = families(results)
    command = results.provenance.get("command")
    flips: dict[str, list[Flip]] = {}
    for flip in results.flips:
        flips.setdefault(flip.arm, []).append(flip)
    return Report(
        title=results.title or f"Comparison with {results.baseline}",
        baseline=results.baseline,
        headline=headline(results),
        summary=[*(" ".join(_summary(results, family)) for family in kinds), *_never_measured(results)],
        quality=quality_tables(results),
        cost=_cost(results),
        details=[
            table
            for table in (
                _best_of_kinds(results),
                _win_rates(results),
                _choices(results),
                _replicates(results),
                _null_checks(results),
                _identities(results),
                _provenance(results),
            )
            if table.rows
        ],
        failures=[(name, arm.error) for name, arm in results.arms.items() if arm.error is not None],
        notes=results.notes,
        flips=flips,
        command=command if isinstance(command, str) else None,
        reading=_reading(results),
    )


# --- in words ----------------------------------------------------------------------------------------------------


def _summary(results: Results, family: Family) -> Iterator[str]:
    ranked = [name for name in family.ranked(results) if family.mean(results.arms[name]) is not None]
    having = [name for name in results.arms if any(family.quality(results.arms[name], one) for one in family.measures)]
    if ranked:
        best = family.mean(results.arms[ranked[0]])
        assert best is not None, "only arms with a mean are ranked"
        figure = f"{words.number(best.value)} {family.unit} ({words.interval(best.ci)})"
        means = {name: mean.value for name in ranked if (mean := family.mean(results.arms[name])) is not None}
        equal = [name for name, value in means.items() if abs(value - best.value) <= ROUNDING * abs(best.value)]
        if len(equal) > 1:
            yield f"{family.title}: {words.joined(equal)} have the best mean, {figure}."
        elif len(having) > 1:
            yield f"{family.title}: {ranked[0]} has the best mean, {figure}."
        else:
            yield f"{family.title}: only {ranked[0]} has a figure, {figure}."
    elif having:
        yield f"{family.title}: there is no mean that arms could be ranked by; the {family.name}s one by one are below."
    else:
        yield f"{family.title}: no arm has a figure."
    if ranked and family.mean(results.arms[results.baseline]) is None:
        yield f"Nothing is compared with {results.baseline}, which has no mean."
    by_verdict: dict[str, list[str]] = {}
    for name in ranked:
        found = family.mean(results.arms[name])
        if found is not None and found.against_baseline is not None:
            by_verdict.setdefault(found.against_baseline.verdict, []).append(name)
    for verdict, sentence in (
        ("better", "Better than {baseline}: {arms}."),
        ("better by less than the margin", "Better than {baseline} by less than the margin: {arms}."),
        ("worse", "Worse than {baseline}: {arms}."),
        ("worse by less than the margin", "Worse than {baseline} by less than the margin: {arms}."),
        ("no difference shown", "No difference from {baseline} shown: {arms}."),
        ("inconclusive", "Inconclusive, more items would tell: {arms}."),
        ("too few items", "Too few items for any verdict: {arms}."),
        ("nothing was answered", "Nothing was answered, by {baseline} or by {arms}."),
    ):
        if arms := by_verdict.get(verdict):
            yield sentence.format(baseline=results.baseline, arms=words.joined(arms))
    counted = results.mean_over.get(family.name, ())
    for measure, reason in results.left_out.items():
        kind, _, name = measure.partition(" ")
        if kind == family.name and name not in counted:
            yield f"The mean leaves out {name}: {reason}."
    if len(family.measures) > 1:
        yield from _unanswered(results, family)
    yield from _absences(results, family.name, [name for name in results.arms if name not in having])


def _absences(results: Results, family: str, lacking: Sequence[str]) -> Iterator[str]:
    """Why arms have no figure at all, those with one reason together; failed ones have a line of their own."""
    of_reason: dict[str, list[str]] = {}
    for name in lacking:
        arm = results.arms[name]
        reasons = [reason for measure, reason in arm.skipped.items() if measure.partition(" ")[0] == family]
        if reasons and arm.error is None:
            of_reason.setdefault("; ".join(dict.fromkeys(reasons)), []).append(name)
    for reason, names in of_reason.items():
        yield f"Without a figure: {words.joined(names)} ({reason})."


def _unanswered(results: Results, family: Family) -> Iterator[str]:
    """Tasks on which an arm answered nothing, which its mean counts as wrong."""
    if family.name != "task":
        return
    for task in family.measures:
        names = [
            name
            for name, arm in results.arms.items()
            if (found := arm.tasks.get(task)) is not None and found.num_missing + found.num_failed == found.num_items
        ]
        if names:
            yield f"Nothing of {task} was answered by {words.joined(names)}; the mean counts that as wrong."


def _never_measured(results: Results) -> Iterator[str]:
    """Of a kind of measure that no arm has any figure of."""
    measured = {family.name for family in families(results)}
    for name, title in (("text", "Texts"), ("task", "Tasks")):
        if name not in measured and (absences := list(_absences(results, name, list(results.arms)))):
            yield " ".join([f"{title}: no arm has a figure.", *absences])


def _reading(results: Results) -> list[str]:
    used = results.statistics
    return [
        f"A range is a {100 * (1 - used.alpha):g}% interval: Tango's score interval for right and wrong, Student's for "
        f"few documents, else of {used.num_resamples:,} bootstrap resamples of the items (seed {used.seed}). "
        "Differences are paired by item; neighbouring documents of one text count for as many as their lag leaves. p "
        "is Holm-adjusted over the arms of a measure.",
        f"Better or worse: the interval of the difference leaves out zero, and p is at most {used.alpha:g}. "
        f"The margin is {used.margin_bpb:g} bits per byte or {used.margin_score:g} of score; a difference whose "
        "interval stays within it around zero is too small to matter. No difference shown: the interval stays within "
        "the margin. Inconclusive: neither, so both nothing and a difference that matters are possible.",
        "Bits per byte are better low, scores better high. Answers that failed or are missing count as wrong.",
    ]


def quality_tables(results: Results) -> list[Table]:
    """The ranking and the measures one by one, of texts and of tasks."""
    kinds = families(results)
    return [table for family in kinds for table in (_ranking(results, family), _by_measure(results, family))]


# --- quality -----------------------------------------------------------------------------------------------------


def _ranking(results: Results, family: Family) -> Table:
    rows = []
    place = 0
    for name in family.ranked(results):
        arm = results.arms[name]
        mean = family.mean(arm)
        head = [name, words.KINDS[arm.kind]]
        if mean is None:
            rows.append([words.NOTHING, *head, _absence(arm, family)])
            continue
        place += 1
        found = mean.against_baseline
        if name == results.baseline or found is None:
            against = ["baseline" if name == results.baseline else words.NOTHING, "", "", ""]
        else:
            against = [
                words.signed(found.difference),
                words.interval(found.ci, is_signed=True),
                words.p_value(found.p_holm),
                words.with_sign(found.verdict),
            ]
        failed = " (not all measures: failed)" if arm.error is not None else ""
        rows.append([str(place), *head, words.number(mean.value), words.interval(mean.ci), *against])
        rows[-1][1] += failed
    better = "higher is better" if family.higher_is_better else "lower is better"
    explanation = (
        f"Mean {family.unit} over {_counted(family, results)}; {better}. Differences are from {results.baseline}."
        if place
        else f"There is no {family.name} that all arms have a figure of and that counts towards a mean."
    )
    return Table(
        f"{family.title}, best first",
        explanation,
        ["place", "arm", "kind", f"mean {family.unit}", "interval", "difference", "its interval", "p", "verdict"],
        rows,
        head=1,
    )


def _counted(family: Family, results: Results) -> str:
    """What the mean is over: "3 texts, without mixed, which is made of them"; "1 task, without essays"."""
    of_family = results.texts if family.name == "text" else results.tasks
    over = results.mean_over.get(family.name, tuple(family.measures))
    counted = f"{len(over)} {family.name}s" if len(over) != 1 else f"1 {family.name}"
    left_out = [name for name in family.measures if name not in over]
    made_of_others = all(of_family[name].source.startswith("switching between ") for name in left_out)
    why = ", which is made of them" if made_of_others else ""
    return f"{counted}, without {words.joined(left_out)}{why}" if left_out else counted


def _absence(arm: ArmResult, family: Family) -> str:
    if arm.error is not None:
        return f"failed: {arm.error}"
    if any(family.quality(arm, measure) is not None for measure in family.measures):
        return f"no mean: its {family.name}s one by one are below"
    reasons = [arm.skipped[key] for measure in family.measures if (key := f"{family.name} {measure}") in arm.skipped]
    return f"not measured: {'; '.join(dict.fromkeys(reasons)) or 'no figure'}"


def _by_measure(results: Results, family: Family) -> Table:
    rows = []
    for name in family.ranked(results):
        arm = results.arms[name]
        rows.append([name, *(_cell(family.quality(arm, measure), arm, family, measure) for measure in family.measures)])
    return Table(
        f"{family.title}, one by one",
        f"{family.unit.capitalize()} with its interval, and what the difference from {results.baseline} allows to say.",
        ["arm", *family.measures],
        rows,
    )


def _cell(quality: Quality | None, arm: ArmResult, family: Family, measure: str) -> str:
    if quality is None:
        return arm.skipped.get(f"{family.name} {measure}", words.NOTHING)
    parts = [f"{words.number(quality.value)} ({words.interval(quality.ci)})"]
    if found := quality.against_baseline:
        parts.append(f"{words.with_sign(found.verdict)}, {words.signed(found.difference)}")
    return "\n".join([*parts, *quality.notes])


# --- cost --------------------------------------------------------------------------------------------------------


def _cost(results: Results) -> Table | None:
    streams = sorted({key for arm in results.arms.values() for key in arm.cost.tokens_per_s}, key=_as_int)
    has_spend = any(arm.cost.spend for arm in results.arms.values())
    rows = []
    for name, arm in results.arms.items():
        cost = arm.cost
        row = [
            name,
            *(_timing(cost.tokens_per_s.get(key), 1) for key in streams),
            _timing(cost.ttft_s, 3),
            words.size(cost.weights_bytes),
            words.size(cost.kv_bytes) + (f" per {cost.kv_tokens:,} tokens" if cost.kv_bytes and cost.kv_tokens else ""),
            words.number(cost.forward_tokens_per_answer_token, 2),
        ]
        if any(cell != words.NOTHING for cell in row[1:]):
            rows.append([*row, *([words.number(cost.spend, 6)] if has_spend else [])])
    if not rows:
        return None
    return Table(
        "Cost",
        "Measured in turns on one machine; medians over the rounds, with their intervals, or from the lowest to the "
        "highest of too few rounds for one. Weights that several members share count once. Forwards: of one token "
        "through one member, prompt included.",
        [
            "arm",
            *(f"tokens/s at {key}" for key in streams),
            "first token (s)",
            "weights",
            "KV cache",
            "forwards per answer token",
            *(["spend"] if has_spend else []),
        ],
        rows,
    )


def _as_int(key: str) -> int:
    return int(key) if key.isdigit() else 0


def _timing(timing: Timing | None, digits: int) -> str:
    if timing is None:
        return words.NOTHING
    if timing.ci is None and timing.range is not None:
        known = f"{words.interval(timing.range, digits)}, lowest to highest of {len(timing.values)}"
    else:
        known = words.interval(timing.ci, digits)
    return f"{words.number(timing.median, digits)} ({known})"


# --- the best of each kind -----------------------------------------------------------------------------------------


def _best_of_kinds(results: Results) -> Table:
    rows = [
        [
            found.measure,
            f"{found.arm} ({BEST[found.kind]})",
            words.number(found.figure),
            f"{found.other} ({BEST[found.other_kind]})",
            words.number(found.other_figure),
            words.signed(gain(found)),
            words.interval(gain_interval(found), is_signed=True),
            words.with_sign(found.verdict),
            f"{found.num_pairs} pairs, each at {100 * found.level:.4g}%",
        ]
        for found in results.best_of_kinds
    ]
    return Table(
        "The best of each kind",
        "Chosen on these very items, so the interval pays for the choice: it is taken at the level at which the "
        "intervals of all pairs of the two kinds hold together. A gain above zero is better.",
        ["measure", "best", "its figure", "against", "its figure", "gain", "interval", "verdict", "the choice"],
        rows,
    )


def _win_rates(results: Results) -> Table:
    rows = [
        [
            name,
            f"{family}s",
            f"{100 * found.win_rate:.1f}%",
            words.signed(found.log_strength, 2),
            words.interval(found.ci, 2, is_signed=True),
            str(found.num_items),
        ]
        for family, arms in results.win_rates.items()
        for name, found in sorted(arms.items(), key=lambda item: -item[1].log_strength)
    ]
    return Table(
        "Win rates",
        "The chance that an arm does better than another one, drawn at random, on an item; its strength is Bradley and "
        "Terry's, in logits, over all pairs of arms at once. Draws are half a win for either.",
        ["arm", "over", "win rate", "strength", "interval", "items"],
        rows,
    )


# --- how it came to be -------------------------------------------------------------------------------------------


def _choices(results: Results) -> Table:
    rows = []
    for name, arm in results.arms.items():
        if arm.weights is not None:
            weights = ", ".join(f"{member} {weight:.3f}" for member, weight in arm.weights.items())
            rows.append([name, "fitted weights", weights])
        if arm.chosen is not None:
            tried = ", ".join(f"{other} {figure:.3f}" for other, figure in arm.chosen.candidates.items())
            rows.append([name, f"chose {arm.chosen.name}", f"{arm.chosen.measure} on the held-out split: {tried}"])
    return Table("Chosen on the held-out split", "Nothing here saw the items above.", ["arm", "what", "found"], rows)


def _replicates(results: Results) -> Table:
    rows = []
    for name, arm in results.arms.items():
        for text, spread in arm.replicates.items():
            values = ", ".join(f"{replicate} {value:.3f}" for replicate, value in spread.values.items())
            rows.append(
                [
                    name,
                    text,
                    values,
                    f"{words.signed(spread.mean)} ({words.interval(spread.ci, is_signed=True)})",
                    words.number(spread.spread),
                ]
            )
    return Table(
        "Members trained with other seeds",
        f"Bits per byte of each replicate; mean difference from {results.baseline} over replicates and documents, and "
        "its standard deviation over replicates.",
        ["arm", "text", "replicates", "difference", "spread"],
        rows,
    )


def _null_checks(results: Results) -> Table:
    rows = [
        [
            check.measure,
            check.method,
            f"{check.num_significant} of {check.num_trials} at p < {check.alpha:g}",
            words.number(check.largest_difference),
            "passed" if check.has_passed else "FAILED: do not trust this measure's verdicts",
        ]
        for check in results.null_checks
    ]
    return Table(
        "The baseline against itself",
        "Where there is nothing to find, the test must find something about as often as its alpha says, and no more.",
        ["measure", "method", "found something", "largest difference", "result"],
        rows,
    )


def _identities(results: Results) -> Table:
    rows = [
        [f"{kind} {name}", str(found.num_items), found.metric, found.source, found.sha256]
        for kind, measures in (("text", results.texts), ("task", results.tasks))
        for name, found in measures.items()
    ]
    return Table(
        "What every arm was given",
        "The SHA-256 covers all items, and prompts, in order: the same for every arm with a figure.",
        ["measure", "items", "metric", "source", "SHA-256"],
        rows,
    )


def _provenance(results: Results) -> Table:
    rows = [[key, value] for key, value in _flat(results.provenance, "") if key != "command"]
    return Table("Versions, machine, hashes", "To repeat it elsewhere.", ["what", "value"], rows)


def _flat(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{at} {key}".strip())
    elif isinstance(value, list | tuple):
        if value:
            yield at, ", ".join(map(str, value))
    elif value is not None:
        yield at, str(value)
