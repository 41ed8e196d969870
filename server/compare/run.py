"""The whole comparison: build the arms, decide what is fitted, measure, compare, report. What is known is not redone.

    merges → weights and variants on held-out text → texts, tasks, cost of every arm → cost-matched arms → replicates
    → results.json, report.md, report.html

Killed at any moment, it goes on where it was when it is run again with the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.analysis.flips import flips
from ensemble_server.server.compare.analysis.items import item_tables, read_fields
from ensemble_server.server.compare.analysis.statistics import compute_pairs, compute_results
from ensemble_server.server.compare.arms.candidates import (
    ArmModel,
    Candidate,
    Distiller,
    Entry,
    as_arm_model,
    build_candidates,
    kind_of,
    made_kind_of,
)
from ensemble_server.server.compare.arms.footprint import free_memory, groups
from ensemble_server.server.compare.deciding.matched import measure_matched
from ensemble_server.server.compare.deciding.preparation import config_with, prepare
from ensemble_server.server.compare.kept.items import ItemTable
from ensemble_server.server.compare.kept.provenance import provenance
from ensemble_server.server.compare.kept.records import Facts, Failure, Records
from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.listener import Listener
from ensemble_server.server.compare.measures.documents import Documents, read_documents
from ensemble_server.server.compare.measures.task_measure import Task
from ensemble_server.server.compare.planning.blocks import Arm, PlanFile
from ensemble_server.server.compare.planning.held_out import check_held_out, check_held_out_rows, check_not_taught
from ensemble_server.server.compare.planning.outlook import outlooks, shared_beginnings
from ensemble_server.server.compare.planning.plan import Plan
from ensemble_server.server.compare.planning.sources import read_clusters, read_tasks, read_text_clusters, read_texts
from ensemble_server.server.compare.running.judging import judge_tasks
from ensemble_server.server.compare.running.measuring import measure_group
from ensemble_server.server.compare.running.recorded import note_recorded
from ensemble_server.server.compare.running.work import Work, introduce

RESULTS_FILE = "results.json"


async def run_comparison(
    plan: Plan, folder: Path, listener: Listener, *, command: str | None = None, distiller: Distiller | None = None
) -> Results:
    """Measure what is not measured yet and write `results.json`, `report.md` and `report.html` into `folder`.

    Arms that fail are in the results with their error. Raises `ConfigError` if a text or a task cannot be read, if what
    is fitted on stands in what is measured, or if another process works in `folder`.
    """
    file = plan.file
    with claimed(folder):
        texts = read_texts(file.text, min_bytes=file.document_bytes)
        held_out = read_texts(file.fit, min_bytes=file.document_bytes)
        tasks = read_tasks(file.tasks)
        notes = _told_before(file, texts, held_out, tasks, listener)
        records = Records(folder)
        work = Work(plan, texts, tasks, records, listener, distiller=distiller)
        arms, entries = await _measure(work, None, held_out)
        matched = await measure_matched(work, entries, arms, folder / "held_out", free_memory())
        await judge_tasks(work, (*plan.arms, *matched.arms))
        for replicate in file.replicates:
            only_texts = replace(work, tasks={}, is_speed_measured=False, with_harness=False)
            await _measure(only_texts, replicate, held_out)
        facts = provenance(
            plan=plan.path,
            config=plan.config.source,
            weights={name: records.get(name).identity for name in (*plan.arms, *matched.arms)},
            files=_files(file),
            command=command,
        )
        Facts(added_arms=matched.arms, notes=(*notes, *matched.notes), provenance=facts).save(folder)
        return write_results(plan, folder, texts, tasks)


def report_again(plan: Plan, folder: Path) -> Results:
    """Results and report once more from what is on disk; no model runs. Raises `ConfigError` if nothing is there."""
    if not (folder / "arms").is_dir():
        raise ConfigError(f"{folder} holds no measured arms; run the comparison without --report-only first")
    with claimed(folder):
        texts = read_texts(plan.file.text, min_bytes=plan.file.document_bytes)
        return write_results(plan, folder, texts, read_tasks(plan.file.tasks))


def write_results(plan: Plan, folder: Path, texts: Mapping[str, Documents], tasks: Mapping[str, Task]) -> Results:
    """`results.json`, `pairs.json` and the report, from the records and facts in `folder`."""
    from ensemble_server.server.compare.report import write_report

    records, facts = Records(folder), Facts.load(folder)
    baseline = records.get(plan.file.baseline)
    per_measure = plan.file.flips.per_arm
    arms = [*plan.arms, *facts.added_arms]
    clusters = read_clusters(plan.file.tasks) | read_text_clusters(plan.file.text, texts)
    results = compute_results(
        plan.file,
        arms,
        records,
        clusters=clusters,
        flips=[
            flip for arm in arms for flip in flips(records.get(arm), baseline, texts, tasks, per_measure=per_measure)
        ],
        notes=facts.notes,
        provenance=facts.provenance,
    )
    results.save(folder / RESULTS_FILE)
    pairs = compute_pairs(plan.file, arms, records, clusters=clusters)
    pairs.save(folder)
    items = item_tables([records.get(arm) for arm in arms], texts, tasks, read_fields(plan.file.tasks))
    write_report(results, folder, pairs=pairs, items=items)
    return results


def read_items(plan: Plan, folder: Path) -> list[ItemTable]:
    """What every arm made of every item, from the records in `folder`. Raises `ConfigError` if data cannot be read."""
    records = Records(folder)
    arms = [*plan.arms, *Facts.load(folder).added_arms]
    texts = read_texts(plan.file.text, min_bytes=plan.file.document_bytes)
    tasks = read_tasks(plan.file.tasks)
    return item_tables([records.get(arm) for arm in arms], texts, tasks, read_fields(plan.file.tasks))


def _told_before(
    file: PlanFile,
    texts: Mapping[str, Documents],
    held_out: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    listener: Listener,
) -> list[str]:
    """What can be said before anything is measured; returned is what the report has to say again.

    Raises `ConfigError` if weights and variants would be chosen on what is measured.
    """
    held_out_rows = read_tasks(
        [
            source.model_copy(update={"data": source.dev, "limit": None})
            for source in file.tasks
            if source.dev is not None
        ]
    )
    check_held_out_rows(tasks, held_out_rows, max_share=file.max_overlap)
    for arm in file.arms:
        if arm.distill is not None:
            taught = [read_documents(Path(path)) for path in arm.distill.text]
            check_not_taught(texts, arm.name, taught, max_share=file.max_overlap)
    overlap = check_held_out(texts, held_out, max_share=file.max_overlap)
    clusters = read_clusters(file.tasks) | read_text_clusters(file.text, texts)
    told = outlooks(file, texts, tasks, clusters)
    warnings = list(shared_beginnings(file, tasks))
    for line in [*(one.sentence for one in told), *([overlap] if overlap is not None else []), *warnings]:
        listener.stage(f"planned: {line}")
    too_few = [f"Too few items for any verdict: {one.sentence}." for one in told if one.is_hopeless]
    recorded = ", ".join(arm.name for arm in file.arms if arm.is_recorded)
    unchecked = (
        [f"Read from files, so that nothing tells what was asked: the answers of {recorded}."] if recorded else []
    )
    return [*([overlap] if overlap is not None else []), *too_few, *unchecked, *(f"{warning}." for warning in warnings)]


async def _measure(
    work: Work, replicate: str | None, held_out: Mapping[str, Documents]
) -> tuple[list[ArmModel], dict[str, Entry]]:
    """All arms of the plan in one replicate. Returns those that could be built, and the entries made for them."""
    plan = work.plan
    members = config_with(plan, replicate, {})
    candidates: dict[str, Sequence[Candidate]] = {}
    for arm in _baseline_first(plan):
        if arm.is_recorded:
            if replicate is None:
                note_recorded(work, arm)
            continue
        if arm.merge is not None or arm.distill is not None or arm.choose:
            work.listener.stage(f"{arm.name}: building")
        candidates[arm.name] = await build_candidates(
            plan, members, arm, distiller=work.distiller, say=work.listener.stage
        )
    prepared = await prepare(plan, replicate, candidates, held_out, work.records, work.listener)
    entries: dict[str, Entry] = {}
    chosen: dict[str, Candidate] = {}
    for name, found in prepared.items():
        if isinstance(found, Failure):
            _note_failure(work, name, replicate, candidates[name][0], found)
            continue
        record = work.records.get(name, replicate)
        record.preparation = found.preparation
        chosen[name] = replace(found.candidate, model=name)
        if found.candidate.entry is not None:
            entries[name] = found.candidate.entry
    config = config_with(plan, replicate, entries)
    arms = introduce(work, config, [as_arm_model(candidate, config, replicate) for candidate in chosen.values()])
    for group in groups(config, arms, free_bytes=free_memory()):
        await measure_group(work, config, group)
    return arms, entries


def _baseline_first(plan: Plan) -> list[Arm]:
    """So that every other arm finds it measured when its flips are looked for."""
    return sorted(plan.file.arms, key=lambda arm: arm.name != plan.file.baseline)


def _note_failure(work: Work, name: str, replicate: str | None, candidate: Candidate, failure: Failure) -> None:
    record = work.records.get(name, replicate)
    if (made := made_kind_of(candidate)) is not None:
        record.kind = made
    elif candidate.variant is not None:
        record.kind = "ensemble"
    else:
        record.kind = kind_of(work.plan.config.models[name])
    record.model, record.failure = name, failure
    record.text, record.tasks, record.cost = {}, {}, None  # of something that cannot be built any more
    work.records.save(record)
    work.listener.stage(f"{name}: failed ({failure.stage}): {failure.message}")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a folder. Raises `ConfigError` if another one does."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as exc:
        raise ConfigError(f"{folder}: another comparison is writing there; wait for it, or give another --out") from exc
    try:
        yield
    finally:
        lock.release()


def _files(file: PlanFile) -> dict[str, Path]:
    sources = {f"text {name}": source.path for name, source in file.text.items()}
    sources |= {f"fit {name}": source.path for name, source in file.fit.items()}
    sources |= {f"task {task.name}": task.data for task in file.tasks}
    sources |= {f"held-out rows of {task.name}": task.dev for task in file.tasks}
    sources |= {
        f"taught {arm.name} {Path(path).name}": path for arm in file.arms if arm.distill for path in arm.distill.text
    }
    sources |= {f"answers {arm.name} {task}": one.path for arm in file.arms for task, one in arm.answers.items()}
    sources |= {f"merge {arm.name}": arm.merge for arm in file.arms if isinstance(arm.merge, str)}
    return {name: Path(path) for name, path in sources.items() if path is not None}
