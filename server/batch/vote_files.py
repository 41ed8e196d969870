"""Files of candidates for a crowd vote, in the four forms that people have them in.

- candidates, one JSON object per line: {"id": ..., "candidates": ["text", {"text": ..., "weight": 2, "system": "b"}]}
- the output of a batch, told by its first line: {"custom_id": ..., "response": {...}, "error": ...}. All choices of all
  lines of one custom_id are the candidates of one row, be they samples, cells of a grid, or answers of several jobs
- one file per system: a text file has one answer per line; a JSONL file has strings, or objects with "text" and "id"
- pairwise scores to replay: JSONL as `ensemble vote --explain` writes it, {"id": ..., "similarity": {name: matrix}}, or
  a CSV or TSV table with the columns id, candidate, reference and one column for each similarity

A row that cannot be used becomes a `BadRow` that says why, in its place. A file that cannot be used as a whole raises
`RequestError` or `OSError`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.batch.results.candidates import BatchLine, grouped

RowId = str | int | float | None


@dataclass(frozen=True)
class CandidateRow:
    """One vote to hold. `weights`, `systems` (None where the file names none): one for each candidate.

    `matrices`: (n, n) scores to replay, by name of similarity; only with these may `texts` be missing.
    """

    id: RowId
    texts: tuple[str, ...] | None
    weights: tuple[float, ...]
    systems: tuple[str | None, ...]
    matrices: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be voted on. `line` counts from 1."""

    id: RowId
    line: int
    error: str


Row = CandidateRow | BadRow


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def _as_text(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


class _Candidate(_Strict):
    text: str
    weight: float = Field(default=1.0, ge=0)
    system: str | None = None


_Candidates = Annotated[list[Annotated[_Candidate, BeforeValidator(_as_text)]], Field(min_length=1)]


class _CandidateLine(_Strict):
    id: RowId = None
    candidates: _Candidates


class _ScoreLine(_Strict):
    id: RowId = None
    similarity: Annotated[dict[str, list[list[float]]], Field(min_length=1)]
    candidates: _Candidates | None = None


class _SystemLine(_Strict):
    id: RowId = None
    text: str


def read_candidates(lines: Iterable[bytes]) -> Iterator[Row]:
    """Rows from the first two forms. A row without an id gets the number of its line."""
    values = _json_lines(lines)
    for number, value in values:
        if isinstance(value, BadRow):
            yield value
            continue
        if BatchLine.is_one(value):
            yield from _batch_rows(chain([(number, value)], values))
            return
        try:
            line = _CandidateLine.model_validate(value)
        except ValidationError as exc:
            yield BadRow(_id_in(value), number, _first_finding(exc))
            continue
        yield _row(number if line.id is None else line.id, line.candidates, {})


def _batch_rows(values: Iterable[tuple[int, Any]]) -> Iterator[Row]:
    """A row for each custom_id of a batch output; answers that failed have no part in the vote."""
    readable = []
    for number, value in values:
        if isinstance(value, BadRow):
            yield value
            continue
        try:
            readable.append((number, BatchLine.model_validate(value)))
        except ValidationError as exc:
            yield BadRow(_id_in(value), number, _first_finding(exc))
    for group in grouped(readable):
        if group.texts:
            weights = (1.0,) * len(group.texts)
            yield CandidateRow(group.custom_id, tuple(group.texts), weights, tuple(group.systems))
        else:
            yield BadRow(group.custom_id, group.line, group.failure or "has no text to vote on")


def read_systems(paths: Sequence[Path]) -> list[Row]:
    """Rows from one file per system, named as the files are.

    Where all lines have ids, each id makes a row, in order of appearance, and a system that lacks it gives a blank
    answer, which has no part in the vote. Else the k-th lines make the k-th row, and all files must be of one length.
    """
    answers = [_system_answers(path) for path in paths]
    names = [path.stem for path in paths] if len({path.stem for path in paths}) == len(paths) else list(map(str, paths))
    if all(row_id is not None for lines in answers for row_id, _ in lines):
        by_id = [dict(lines) for lines in answers]
        for path, lines, distinct in zip(paths, answers, by_id, strict=True):
            if len(distinct) < len(lines):
                raise RequestError(f"{path}: an id stands on several lines")
        ids = list(dict.fromkeys(row_id for lines in answers for row_id, _ in lines))
        texts = [[lines.get(row_id, "") for lines in by_id] for row_id in ids]
    else:
        lengths = {str(path): len(lines) for path, lines in zip(paths, answers, strict=True)}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{path} has {length}" for path, length in lengths.items())
            raise RequestError(f"the systems' files must have equally many lines, or ids on every line: {found}")
        ids = list(range(1, len(answers[0]) + 1))
        texts = [[text for _, text in row] for row in zip(*answers, strict=True)]
    weights = (1.0,) * len(paths)
    return [CandidateRow(row_id, tuple(row), weights, tuple(names)) for row_id, row in zip(ids, texts, strict=True)]


def read_scores(path: Path) -> Iterator[Row]:
    """Rows with scores to replay, from JSONL or from a table; by the file's ending."""
    if path.suffix in {".csv", ".tsv"}:
        yield from _score_table(path)
        return
    with path.open("rb") as lines:
        for number, value in _json_lines(lines):
            if isinstance(value, BadRow):
                yield value
                continue
            try:
                line = _ScoreLine.model_validate(value)
                matrices = {name: _square(name, matrix) for name, matrix in line.similarity.items()}
                if len({len(matrix) for matrix in matrices.values()}) > 1:
                    raise ValueError("the matrices differ in size")
                num_candidates = len(next(iter(matrices.values())))
                if line.candidates is not None and len(line.candidates) != num_candidates:
                    raise ValueError(f"there are {len(line.candidates)} candidates, but scores of {num_candidates}")
            except ValidationError as exc:
                yield BadRow(_id_in(value), number, _first_finding(exc))
            except ValueError as exc:
                yield BadRow(_id_in(value), number, f"similarity: {exc}")
            else:
                row_id = number if line.id is None else line.id
                if line.candidates is None:
                    yield CandidateRow(row_id, None, (1.0,) * num_candidates, (None,) * num_candidates, matrices)
                else:
                    yield _row(row_id, line.candidates, matrices)


def _json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank; the value of one that is not JSON is a `BadRow`."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, from_json(line, allow_inf_nan=False)
            except ValueError as exc:
                yield number, BadRow(None, number, f"is not JSON: {exc}")


def _row(row_id: RowId, candidates: Sequence[_Candidate], matrices: Mapping[str, np.ndarray]) -> CandidateRow:
    return CandidateRow(
        row_id,
        tuple(candidate.text for candidate in candidates),
        tuple(candidate.weight for candidate in candidates),
        tuple(candidate.system for candidate in candidates),
        matrices,
    )


def _system_answers(path: Path) -> list[tuple[RowId, str]]:
    if path.suffix != ".jsonl":
        with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028 and its like
            return [(None, line.rstrip("\n")) for line in lines]
    answers = []
    with path.open("rb") as lines:
        for number, value in _json_lines(lines):
            if isinstance(value, BadRow):
                raise RequestError(f"{path}, line {number}: {value.error}")
            try:
                line = _SystemLine.model_validate(_as_text(value))
            except ValidationError as exc:
                raise RequestError(f"{path}, line {number}: {_first_finding(exc)}") from exc
            answers.append((line.id, line.text))
    return answers


def _score_table(path: Path) -> Iterator[Row]:
    """A row of the table is one ordered pair. A pair that is given in one order only counts in both."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = [name for name in table.fieldnames or () if name not in ("id", "candidate", "reference")]
        if not {"id", "candidate", "reference"} <= set(table.fieldnames or ()) or not names:
            raise RequestError(f"{path}: must have the columns id, candidate, reference and at least one of scores")
        pairs: dict[str, list[tuple[int, dict[str, str]]]] = {}
        for record in table:
            pairs.setdefault(record["id"], []).append((table.line_num, record))
    for row_id, records in pairs.items():
        labels = list(dict.fromkeys(record[end] for _, record in records for end in ("candidate", "reference")))
        try:
            matrices = {name: _matrix_of_pairs(name, labels, records) for name in names}
        except ValueError as exc:
            yield BadRow(row_id, records[0][0], str(exc))
            continue
        yield CandidateRow(row_id, None, (1.0,) * len(labels), tuple(labels), matrices)


def _matrix_of_pairs(name: str, labels: Sequence[str], records: Iterable[tuple[int, dict[str, str]]]) -> np.ndarray:
    place = {label: index for index, label in enumerate(labels)}
    matrix = np.full((len(labels), len(labels)), np.nan)
    for line, record in records:
        try:
            score = float(record[name])
        except (TypeError, ValueError):
            raise ValueError(f"line {line}: {name} must be a number, got {record[name]!r}") from None
        if not np.isfinite(score):
            raise ValueError(f"line {line}: {name} must be a finite number, got {record[name]!r}")
        matrix[place[record["candidate"]], place[record["reference"]]] = score
    matrix = np.where(np.isnan(matrix), matrix.T, matrix)
    np.fill_diagonal(matrix, np.where(np.isnan(matrix.diagonal()), 1.0, matrix.diagonal()))
    for i, j in np.argwhere(np.isnan(matrix)):
        raise ValueError(f"there is no {name} of {labels[i]!r} and {labels[j]!r}")
    return matrix


def _square(name: str, rows: Sequence[Sequence[float]]) -> np.ndarray:
    if any(len(row) != len(rows) for row in rows) or not rows:
        raise ValueError(f"{name} must be a square matrix")
    return np.array(rows, dtype=np.float64)


def _id_in(value: Any) -> RowId:
    found = value.get("id", value.get("custom_id")) if isinstance(value, dict) else None
    return found if isinstance(found, str | int | float) else None


def _first_finding(error: ValidationError) -> str:
    finding = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(map(str, finding["loc"]))
    return f"{path}: {finding['msg']}" if path else finding["msg"]
