"""The line that owners want: the best ensemble against the best merge and the best single model, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

from ensemble_server.server.compare.kept.results import ArmKind, BestOfKinds, Cost, Results
from ensemble_server.server.compare.report import words

BEST: dict[ArmKind, str] = {
    "ensemble": "best ensemble",
    "merge": "best merge",
    "distilled": "best distilled model",
    "member": "best single model",
    "remote": "best remote model",
    "cost_matched": "best single model with samples for the same cost",
}
FAMILIES = {"mean text": ("Texts", "bits per byte"), "mean task": ("Tasks", "of score")}
OUTCOMES = {
    "better": "better",
    "worse": "worse",
    "better by less than the margin": "better by less than the margin",
    "worse by less than the margin": "worse by less than the margin",
    "no difference shown": "no difference shown",
    "inconclusive": "inconclusive",
    "too few items": "too few items for a verdict",
    "nothing was answered": "nothing was answered",
}


def headline(results: Results) -> list[str]:
    """A sentence for each contrast of the means with an ensemble in it; else with a merge. None where no two kinds have
    a figure."""
    of_means = [found for found in results.best_of_kinds if found.measure in FAMILIES]
    with_ensemble = {found.measure for found in of_means if found.kind == "ensemble"}
    return [
        _sentence(found, results)
        for found in of_means
        if found.kind == "ensemble" or found.measure not in with_ensemble
    ]


def gain(found: BestOfKinds) -> float:
    """Above zero where `arm` is better."""
    return found.difference if found.higher_is_better else -found.difference


def gain_interval(found: BestOfKinds) -> tuple[float, float] | None:
    if found.ci is None or found.higher_is_better:
        return found.ci
    return -found.ci[1], -found.ci[0]


def _sentence(found: BestOfKinds, results: Results) -> str:
    family, unit = FAMILIES[found.measure]
    ours, theirs = results.arms[found.arm].cost, results.arms[found.other].cost
    return (
        f"{family}: {BEST[found.kind]} {found.arm} against {BEST[found.other_kind]} {found.other}: "
        f"gain {words.signed(gain(found))} {unit} ({words.interval(gain_interval(found), is_signed=True)}), "
        f"{OUTCOMES[found.verdict]}; price: {price(ours, theirs)}."
    )


def price(ours: Cost, theirs: Cost) -> str:
    """What one arm takes beside another: "2.4 times the time per answer token, the same weights"."""
    return ", ".join(_parts(ours, theirs)) or "not measured"


def _parts(ours: Cost, theirs: Cost) -> Iterator[str]:
    streams = next((key for key in ours.tokens_per_s if key in theirs.tokens_per_s), None)
    if streams is not None:
        mine, other = ours.tokens_per_s[streams].median, theirs.tokens_per_s[streams].median
        if mine > 0 and other > 0:
            yield f"{_times(other / mine)} time per answer token"
    if ours.weights_bytes and theirs.weights_bytes:
        yield f"{_times(ours.weights_bytes / theirs.weights_bytes)} weights"
    if ours.spend or theirs.spend:
        yield f"spent {_money(ours.spend)} against {_money(theirs.spend)}"


def _money(spend: float | None) -> str:
    return "what nobody knows" if spend is None else f"{spend:.6g}"


def _times(ratio: float) -> str:
    """1.004 -> "the same", 2.413 -> "2.4 times the" """
    return "the same" if 0.99 < ratio < 1.01 else f"{ratio:.2g} times the"
