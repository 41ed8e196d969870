"""Figures and verdicts as a reader meets them: rounded, with their unit, and no stronger than the statistics."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_server.ensembles.comparison.verdict import Verdict
from ensemble_server.server.compare.kept.results import ArmKind, Difference, Interval

SIGNS: dict[Verdict, str] = {
    "better": "▲",
    "worse": "▼",
    "better by less than the margin": "△",
    "worse by less than the margin": "▽",
    "no difference shown": "=",
    "inconclusive": "?",
    "too few items": "…",
    "nothing was answered": "∅",
}
KINDS: dict[ArmKind, str] = {
    "member": "single model",
    "remote": "remote model",
    "ensemble": "ensemble",
    "merge": "weight merge",
    "distilled": "distilled",
    "cost_matched": "cost-matched",
}
NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """0.75149 -> "0.751" """
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """-0.0312 -> "−0.031"; what rounds to nothing has no sign."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def interval(ci: Interval | None, digits: int = 3, *, is_signed: bool = False) -> str:
    """(0.7, 0.8) -> "0.700 to 0.800" """
    if ci is None:
        return "no interval"
    low, high = (signed(end, digits) if is_signed else number(end, digits) for end in ci)
    return f"{low} to {high}"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def with_sign(verdict: Verdict) -> str:
    return f"{SIGNS[verdict]} {verdict}"


def difference(found: Difference, baseline: str, unit: str) -> str:
    """One sentence's worth: the verdict, the effect with its interval, and what an open verdict leaves possible."""
    gap = f"{signed(found.difference)} {unit} ({interval(found.ci, is_signed=True)})"
    match found.verdict:
        case "better" | "worse":
            return f"{found.verdict} than {baseline}: {gap}"
        case "better by less than the margin" | "worse by less than the margin":
            return f"{found.verdict.split()[0]} than {baseline} by less than the margin: {gap}"
        case "no difference shown":
            return f"no difference from {baseline} shown: {gap}"
        case "too few items":
            return f"too few items for any verdict against {baseline}: {gap}"
        case "nothing was answered":
            return f"nothing was answered, so nothing is said against {baseline}"
    could = "" if found.detectable is None else f"; a difference of {number(found.detectable)} would have shown"
    return f"inconclusive against {baseline}: {gap}{could}"


def joined(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c" """
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def size(num_bytes: int | None) -> str:
    """540_000_000 -> "540 MB" """
    if num_bytes is None:
        return NOTHING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"
