"""Outputs of classify jobs, one file per job or all in one: whose probabilities are averaged, row by row.

A row is a custom_id; a job is a file, or in one file a model. A job that lacks a row, or failed on it, has no part in
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.ensembles.label_probabilities import LabelPool, as_ranks, averaged, geometric, likeliest
from ensemble_server.server.batch.votes.rows import BadRow, RowId, first_finding, id_in, json_lines


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Failure(_Strict):
    message: str = "failed"


class _Body(_Strict):
    model: str | None = None
    probabilities: dict[str, float] = Field(default_factory=dict)
    error: _Failure | None = None


class _Response(_Strict):
    body: _Body


class _Line(_Strict):
    custom_id: str | int
    response: _Response | None = None
    error: _Failure | None = None


@dataclass
class ClassRow:
    """What each job gives the labels of one row. `line`: where it stood first, in the first file that has it."""

    id: RowId
    line: int
    jobs: dict[str, dict[str, float]] = field(default_factory=dict)
    failure: str | None = None


def read_classifications(paths: Sequence[Path]) -> list[ClassRow | BadRow]:
    """The rows of all jobs, in order of appearance. Raises `RequestError` if a job has a row twice."""
    rows: dict[RowId, ClassRow] = {}
    bad: list[ClassRow | BadRow] = []
    names = [path.stem for path in paths] if len({path.stem for path in paths}) == len(paths) else list(map(str, paths))
    for path, name in zip(paths, names, strict=True):
        with path.open("rb") as lines:
            for number, value in json_lines(lines, str(path)):
                found = _line(value, number)
                if isinstance(found, BadRow):
                    bad.append(BadRow(found.id, number, f"{path}, line {number}: {found.error}"))
                    continue
                row = rows.setdefault(found.custom_id, ClassRow(found.custom_id, number))
                failure = found.error or (found.response.body.error if found.response is not None else None)
                if failure is not None or found.response is None:
                    row.failure = (
                        row.failure or f"{path}, line {number}: {failure.message if failure else 'no response'}"
                    )
                    continue
                body = found.response.body
                job = name if len(paths) > 1 else body.model or name
                if job in row.jobs:
                    raise RequestError(f"{path}, line {number}: {job} has the row {found.custom_id!r} twice")
                row.jobs[job] = body.probabilities
    return [*rows.values(), *bad]


def _line(value: object, number: int) -> _Line | BadRow:
    if isinstance(value, BadRow):
        return value
    try:
        line = _Line.model_validate(value)
    except ValidationError as exc:
        return BadRow(id_in(value), number, first_finding(exc))
    if line.response is not None and line.response.body.error is None and not line.response.body.probabilities:
        return BadRow(line.custom_id, number, "is no output of a classify job: its body has no probabilities")
    return line


def pooled_rows(
    rows: Sequence[ClassRow | BadRow], pool: LabelPool, weights: Mapping[str, float]
) -> list[dict[str, object] | BadRow]:
    """The report of each row: {"id", "label", "probabilities", "jobs"}. `weights`: of jobs; 1 for those not named."""
    checked = [_checked(row, weights) for row in rows]
    if pool == "ranks":
        _to_ranks([row for row in checked if isinstance(row, ClassRow)])
    reports: list[dict[str, object] | BadRow] = []
    for row in checked:
        if isinstance(row, BadRow):
            reports.append(row)
            continue
        own = {job: weights.get(job, 1.0) for job in row.jobs}
        shares = geometric(row.jobs, own) if pool == "geometric" else averaged(row.jobs, own)
        total = sum(shares.values())
        shares = {label: share / total for label, share in shares.items()}
        reports.append({"id": row.id, "label": likeliest(shares), "probabilities": shares, "jobs": list(row.jobs)})
    return reports


def _checked(row: ClassRow | BadRow, weights: Mapping[str, float]) -> ClassRow | BadRow:
    if isinstance(row, BadRow):
        return row
    row.jobs = {job: given for job, given in row.jobs.items() if weights.get(job, 1.0) > 0}
    if not row.jobs:
        return BadRow(row.id, row.line, row.failure or "no job of a weight above zero has probabilities for it")
    labels = {frozenset(given) for given in row.jobs.values()}
    if len(labels) > 1:
        return BadRow(row.id, row.line, f"its jobs have different labels: {', '.join(row.jobs)}")
    return row


def _to_ranks(rows: Sequence[ClassRow]) -> None:
    """Replaces each job's probabilities by their ranks among its rows. Raises `RequestError` if its labels change."""
    for job in dict.fromkeys(job for row in rows for job in row.jobs):
        own = [row for row in rows if job in row.jobs]
        if len({frozenset(row.jobs[job]) for row in own}) > 1:
            raise RequestError(f"{job}: ranks need the same labels in all rows")
        for row, ranks in zip(own, as_ranks([row.jobs[job] for row in own]), strict=True):
            row.jobs[job] = ranks
