"""The tables of docs/results.md, made anew: the comparisons are run, and what they found is written into the page.

    python -m benchmarks.results_page [--runs FOLDER] [--only demo share seeds merges] [--fill]

Each plan is run by `ensemble compare` into its folder under `--runs` (default: results), where a run that was stopped
goes on. Then every part of the page between `<!-- made from RUN: PART -->` and `<!-- end -->` is replaced by what
`results.json` of that run says; runs that are not there leave their parts as they are. `--fill`: only that, nothing is
run. The seeds' experts are not in the repository (`experts/train.py` makes them), so `--only` names them on demand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ensemble_server.server.compare.kept.results import ArmResult, Cost, Difference, Results, Timing
from ensemble_server.server.compare.report import words
from ensemble_server.server.compare.report.headline import headline

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
PLANS = {name: ROOT / "configs" / f"compare-{name}.yaml" for name in ("demo", "share", "seeds", "merges")}
USUAL = ("demo", "share", "merges")

_PART = re.compile(r"(<!-- made from (\w+): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def against(found: Difference | None, digits: int = 3) -> str:
    """−0.025 [−0.030 to −0.021] better"""
    if found is None:
        return ""
    ends = words.interval(found.ci, digits, is_signed=True)
    return f"{words.signed(found.difference, digits)} [{ends}] {found.verdict}"


def best_first(results: Results) -> list[str]:
    """Arms with a mean over texts."""
    means = {name: arm.mean_text.value for name, arm in results.arms.items() if arm.mean_text is not None}
    return sorted(means, key=means.__getitem__)


# --- the parts of the page -------------------------------------------------------------------------------------------


def lines(results: Results) -> str:
    """What the report begins with."""
    return "\n".join(f"- {sentence}" for sentence in headline(results))


def arms(results: Results) -> str:
    """Every arm: its texts, their mean, and what the mean and the text that switches say against the baseline."""
    counted = results.mean_over.get("text", ())
    others = [text for text in results.texts if text not in counted]
    columns = ["arm", *counted, "mean", "difference, 95% interval, verdict"]
    columns += [part for text in others for part in (text, "difference, 95% interval, verdict")]
    rows = []
    for name in best_first(results):
        arm = results.arms[name]
        mean = arm.mean_text
        assert mean is not None, "only these are ranked"
        row = [name, *(_bpb(arm, text) for text in counted), words.number(mean.value), against(mean.against_baseline)]
        for text in others:
            found = arm.text.get(text)
            row += [_bpb(arm, text), against(found and found.against_baseline)]
        rows.append(row)
    return table(columns, rows)


def _bpb(arm: ArmResult, text: str) -> str:
    return words.number(arm.text[text].bpb) if text in arm.text else words.NOTHING


def per_text(results: Results) -> str:
    """The best ensemble against the best merge of each text, both chosen on it; the interval pays for that."""
    rows = [
        [
            found.measure.removeprefix("text "),
            found.other,
            words.number(found.other_figure),
            found.arm,
            words.number(found.figure),
            f"{words.signed(-found.difference)}{_turned(found.ci)} {found.verdict}",
        ]
        for found in results.best_of_kinds
        if found.measure.startswith("text ") and (found.kind, found.other_kind) == ("ensemble", "merge")
    ]
    columns = ["text", "best merge", "bits per byte", "best ensemble", "bits per byte", "gain, 95% interval, verdict"]
    return table(columns, rows)


def _turned(ci: tuple[float, float] | None) -> str:
    return "" if ci is None else f" [{words.interval((-ci[1], -ci[0]), is_signed=True)}]"


def costs(results: Results) -> str:
    streams = list(next((arm.cost.tokens_per_s for arm in results.arms.values() if arm.cost.tokens_per_s), ()))
    columns = ["arm", *(f"tokens/s, {one} at once" for one in streams), "beside the baseline", "first token, s"]
    columns += ["weights", "KV cache", "forwards per answer token"]
    rows = [
        [
            name,
            *(_timing(arm.cost.tokens_per_s.get(one), 1) for one in streams),
            ", ".join(_timing(arm.cost.speed_ratio.get(one), 2) for one in streams),
            _timing(arm.cost.ttft_s, 2),
            words.size(arm.cost.weights_bytes),
            words.size(arm.cost.kv_bytes),
            words.number(arm.cost.forward_tokens_per_answer_token, 1),
        ]
        for name, arm in results.arms.items()
        if arm.cost != Cost()
    ]
    return table(columns, rows)


def _timing(timing: Timing | None, digits: int) -> str:
    return words.NOTHING if timing is None else words.number(timing.median, digits)


def choices(results: Results) -> str:
    """What held-back text chose, of how many."""
    rows = [
        [name, arm.chosen.name, str(len(arm.chosen.candidates)), _spread(arm.chosen.candidates)]
        for name, arm in results.arms.items()
        if arm.chosen is not None
    ]
    return table(["arm", "chosen", "of", "bits per byte on held-back text, best to worst"], rows)


def _spread(candidates: Mapping[str, float]) -> str:
    return f"{min(candidates.values()):.3f} to {max(candidates.values()):.3f}"


def replicates(results: Results) -> str:
    names = list(
        dict.fromkeys(name for arm in results.arms.values() for one in arm.replicates.values() for name in one.values)
    )
    rows = [
        [
            name,
            text,
            *(words.signed(found.differences[one]) if one in found.differences else words.NOTHING for one in names),
            f"{words.signed(found.mean)} [{words.interval(found.ci, is_signed=True)}]",
        ]
        for name, arm in results.arms.items()
        if name != results.baseline
        for text, found in arm.replicates.items()
    ]
    return table(["arm", "text", *names, "mean, 95% interval"], rows)


def texts(results: Results) -> str:
    """Every arm on every text, none of them counted together."""
    rows = [
        [name, *(_with_difference(arm, text) for text in results.texts)]
        for name, arm in results.arms.items()
        if arm.text
    ]
    return table(["arm", *results.texts], rows)


def _with_difference(arm: ArmResult, text: str) -> str:
    if text not in arm.text:
        return words.NOTHING
    found = arm.text[text]
    difference = f"; {against(found.against_baseline, 4)}" if found.against_baseline is not None else ""
    return f"{words.number(found.bpb, 4)}{difference}"


def checks(results: Results) -> str:
    """What the report warns of: how many documents, their lag, and the baseline against itself."""
    said = [f"{name}: {found.num_items} documents" for name, found in results.texts.items()]
    failed = [f"{one.measure} ({one.method})" for one in results.null_checks if not one.has_passed]
    told = f"Null checks that failed: {'; '.join(failed)}." if failed else "All null checks passed."
    return "\n".join(f"- {line}" for line in (f"{', '.join(said)}.", told, *results.notes))


PARTS: Mapping[str, Callable[[Results], str]] = {
    "headline": lines,
    "arms": arms,
    "per-text": per_text,
    "costs": costs,
    "choices": choices,
    "replicates": replicates,
    "texts": texts,
    "checks": checks,
}


def filled(page: str, runs: Mapping[str, Results]) -> str:
    """The page with the parts of these runs made anew. Raises `KeyError` for a part that nobody makes."""

    def made(found: re.Match[str]) -> str:
        begin, run, part, end = found.groups()
        make = PARTS[part]
        return f"{begin}\n{make(runs[run])}\n\n{end}" if run in runs else found.group()

    return _PART.sub(made, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "results", help="where the runs' folders are")
    parser.add_argument("--only", nargs="+", choices=list(PLANS), default=list(USUAL))
    parser.add_argument("--fill", action="store_true", help="run nothing; write what is there into the page")
    options = parser.parse_args()
    for name in () if options.fill else options.only:
        command = ["ensemble", "compare", str(PLANS[name]), "--out", str(options.runs / name)]
        print("$", *command, flush=True)
        if subprocess.run(command, check=False).returncode not in (0, 3):  # 3: some arms failed, their rows say why
            sys.exit(f"{name} did not come to its end; the same command goes on from there")
    found = {name: options.runs / name / "results.json" for name in PLANS}
    runs = {name: Results.load(file) for name, file in found.items() if file.is_file()}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    print(f"{PAGE}: written from {', '.join(runs) or 'nothing'}")


if __name__ == "__main__":
    main()
