"""Two results of comparisons: the same arms on the same items, yesterday and today.

Where the records lie beside both files and the items are the same, an arm is compared with itself as it is with a
baseline: paired, item by item, Holm over the arms of a measure. Else only the figures are set side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.analysis.pairing import (
    Counted,
    Rules,
    Unadjusted,
    adjusted,
    comparisons,
    has_figures,
    has_scores,
)
from ensemble_server.server.compare.kept.records import ArmRecord, Records
from ensemble_server.server.compare.kept.results import ArmResult, Difference, Results

MAX_SHOWN = 8  # items or facts that are listed by name
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Run:
    """`records`: by arm, where they lie beside the results."""

    results: Results
    records: Mapping[str, ArmRecord]


@dataclass(frozen=True)
class Change:
    """`difference`: the second less the first; None, with the `reason`, where items cannot be paired."""

    arm: str
    measure: str
    before: float
    after: float
    difference: Difference | None = None
    reason: str = ""
    flipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Changes:
    notes: tuple[str, ...]
    changes: tuple[Change, ...]


def read_run(path: Path) -> Run:
    """A `results.json`, or the folder that holds one. Raises `ConfigError`."""
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        results = Results.load(file)
    except OSError as exc:
        raise ConfigError(f"{file}: cannot be read ({exc.strerror or exc}); give a results.json or its folder") from exc
    except ValidationError as exc:
        raise ConfigError(f"{file}: is no results.json of this version ({exc.error_count()} problems)") from exc
    records = Records(file.parent)
    known = {name: records.get(name) for name in results.arms if records.path(name).is_file()}
    return Run(results, known)


def compare_runs(first: Run, second: Run) -> Changes:
    """Of arms and measures that both have, in the order of the second."""
    old, new = first.results, second.results
    paired = _paired(first, second)
    changes = []
    for name, arm in new.arms.items():
        before, after = _figures(old.arms[name]) if name in old.arms else {}, _figures(arm)
        for measure in [one for one in after if one in before]:
            difference = paired.get(measure, {}).get(name)
            changes.append(
                Change(
                    name,
                    measure,
                    before[measure],
                    after[measure],
                    difference,
                    "" if difference is not None else _why_not(measure, name, first, second),
                    _flipped(measure, first.records.get(name), second.records.get(name))
                    if difference is not None
                    else (),
                )
            )
    return Changes(tuple(_notes(old, new)), tuple(changes))


def _figures(arm: ArmResult) -> dict[str, float]:
    return {f"text {name}": found.bpb for name, found in arm.text.items()} | {
        f"task {name}": found.score for name, found in arm.tasks.items()
    }


def _paired(first: Run, second: Run) -> dict[str, dict[str, Difference]]:
    """measure -> arm -> its difference from itself in the first run, adjusted over the arms."""
    used = second.results.statistics
    neighbours = [name for name, found in second.results.texts.items() if not found.source.endswith(".jsonl")]
    kinds = (("text", second.results.texts), ("task", second.results.tasks))
    clusters = {
        f"{kind} {name}": list(map(str, found.clusters))
        for kind, measures in kinds
        for name, found in measures.items()
        if found.clusters is not None
    }
    rules = Rules(
        used.seed,
        used.num_resamples,
        used.alpha,
        used.margin_bpb,
        used.margin_score,
        clusters,
        neighbours=frozenset(f"text {name}" for name in neighbours),
    )
    counted = Counted(list(second.results.texts), list(second.results.tasks), (), ())
    families: dict[str, dict[str, Unadjusted]] = {}
    for name, record in second.records.items():
        if name in first.records:
            for measure, found in comparisons(record, first.records[name], counted, rules):
                families.setdefault(measure, {})[name] = found
    return {measure: adjusted(family, rules) for measure, family in families.items()}


def _why_not(measure: str, arm: str, first: Run, second: Run) -> str:
    kind, _, name = measure.partition(" ")
    has = has_figures if kind == "text" else has_scores
    if any(arm not in run.records or not has(run.records[arm], name) for run in (first, second)):
        return "its records (arms/) are not beside both files, so items cannot be paired"
    return "the items are not the same"


def _flipped(measure: str, before: ArmRecord | None, after: ArmRecord | None) -> tuple[str, ...]:
    """Items of a task whose score changed, the first of them by name."""
    kind, _, name = measure.partition(" ")
    if kind != "task" or before is None or after is None:
        return ()
    pairs = zip(before.tasks[name].items, after.tasks[name].items, strict=True)
    changed = [new.id for old, new in pairs if old.score != new.score]
    return (*changed[:MAX_SHOWN], *([f"{len(changed) - MAX_SHOWN} more"] if len(changed) > MAX_SHOWN else []))


def _notes(old: Results, new: Results) -> Iterator[str]:
    for which, ours, others in (("first", old, new), ("second", new, old)):
        if alone := [name for name in ours.arms if name not in others.arms]:
            yield f"only in the {which}: {', '.join(alone)}"
    for which, ours, others in (("first", old, new), ("second", new, old)):
        measures = [f"text {name}" for name in ours.texts if name not in others.texts]
        measures += [f"task {name}" for name in ours.tasks if name not in others.tasks]
        if measures:
            yield f"measured only in the {which}: {', '.join(measures)}"
    if old.baseline != new.baseline:
        yield f"baseline: {old.baseline} → {new.baseline}"
    for name, arm in new.arms.items():
        if name in old.arms and arm.error != old.arms[name].error:
            yield f"{name}: {old.arms[name].error or 'measured'} → {arm.error or 'measured'}"
    before, after = dict(_flat(old.provenance, "")), dict(_flat(new.provenance, ""))
    changed = [key for key in (before | after) if before.get(key) != after.get(key) and key != "command"]
    for key in changed[:MAX_SHOWN]:
        yield f"{key}: {before.get(key, 'nothing')} → {after.get(key, 'nothing')}"
    if len(changed) > MAX_SHOWN:
        yield f"... and {len(changed) - MAX_SHOWN} more of versions, machine and hashes"


def _flat(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{at} {key}".strip())
    elif value is not None:
        yield at, str(value)
