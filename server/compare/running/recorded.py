"""Arms whose answers are there already: nothing is asked, everything is judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ensemble_server.ensembles.errors import EnsembleError, UnsupportedError
from ensemble_server.server.compare.kept.content_cache import file_sha256
from ensemble_server.server.compare.kept.records import Failure, TaskRecord, inputs_hash
from ensemble_server.server.compare.measures.recorded_answers import Recorded, read_recorded, score_recorded
from ensemble_server.server.compare.planning.blocks import Arm
from ensemble_server.server.compare.running.measuring import item_record
from ensemble_server.server.compare.running.work import Work, task_sha256


def note_recorded(work: Work, arm: Arm) -> None:
    """Judge its answers to every task that it has answers to. A file that cannot be read is the arm's failure."""
    record = work.records.get(arm.name)
    record.kind, record.model, record.members = arm.kind or "member", arm.name, []
    record.description, record.failure, record.cost = arm.description, None, None
    record.text, record.tasks = {}, {}
    try:
        recorded = {name: read_recorded(Path(one.path), one.system) for name, one in arm.answers.items()}
        files = {name: [file_sha256(Path(one.path)), one.system] for name, one in arm.answers.items()}
        record.identity = inputs_hash(files)
        for name, answers in recorded.items():
            record.tasks[name] = _judged(work, name, answers, record.identity)
    except (EnsembleError, OSError) as exc:
        record.failure, record.tasks = Failure(stage="answers", message=str(exc)), {}
        work.listener.stage(f"{arm.name}: failed (answers): {exc}")
    work.records.save(record)


def _judged(work: Work, name: str, answers: Mapping[str, Recorded], identity: str) -> TaskRecord:
    task = work.tasks[name]
    record = TaskRecord(inputs=identity, items_sha256=task_sha256(task), metric=task.metric)
    try:
        record.items = [item_record(item) for item in score_recorded(task, answers)]
    except UnsupportedError as exc:
        record.skipped = str(exc)
    return record
