"""Pairwise scores to replay: JSONL as `ensemble vote --explain` writes it, or a table.

JSONL has lines of {"id": ..., "similarity": {name: matrix}}; a CSV or TSV table has the columns id, candidate,
reference and one for each similarity.

They may come without the texts. `joined` gives them to rows that have these, by the rows' ids.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.batch.votes.candidates import Candidates, Strict, row_of
from ensemble_server.server.batch.votes.rows import (
    BadRow,
    CandidateRow,
    Row,
    RowId,
    first_finding,
    id_in,
    json_lines,
    read_text,
)


class _ScoreLine(Strict):
    id: RowId = None
    similarity: Annotated[dict[str, list[list[float]]], Field(min_length=1)]
    candidates: Candidates | None = None


def read_scores(path: Path) -> Iterator[Row]:
    """Rows with scores to replay, from JSONL or from a table; by the file's ending."""
    if path.suffix in {".csv", ".tsv"}:
        yield from _score_table(path)
        return
    with path.open("rb") as lines:
        for number, value in json_lines(lines, str(path)):
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
                yield BadRow(id_in(value), number, first_finding(exc))
                continue
            except ValueError as exc:
                yield BadRow(id_in(value), number, f"similarity: {exc}")
                continue
            row_id = number if line.id is None else line.id
            if line.candidates is None:
                ones, nobody = (1.0,) * num_candidates, (None,) * num_candidates
                yield CandidateRow(row_id, number, None, ones, nobody, matrices)
            else:
                row = row_of(row_id, number, line.candidates)
                yield row if isinstance(row, BadRow) else replace(row, matrices=matrices)


def joined(rows: Iterable[Row], scores: Iterable[Row], path: Path) -> Iterator[Row]:
    """`rows` with the scores of the same id. `path`: where the scores are from, for what is wrong with them.

    Scores of a table belong to the candidate whose system, or else whose place from 0, their labels name; those of
    JSONL to the candidates in their order.
    """
    by_id = {str(row.id): row for row in scores}
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        found = by_id.get(str(row.id))
        try:
            if found is None:
                raise ValueError(f"{path} has no scores of it")
            if isinstance(found, BadRow):
                raise ValueError(f"{path}, line {found.line}: {found.error}")
            order = np.array(_places(row, found))
        except ValueError as exc:
            yield BadRow(row.id, row.line, str(exc))
            continue
        matrices = {name: matrix[np.ix_(order, order)] for name, matrix in found.matrices.items()}
        yield replace(row, matrices=matrices)


def _places(row: CandidateRow, scores: CandidateRow) -> list[int]:
    """Where each candidate of `row` stands among the scores. Raises `ValueError` if they are of other candidates."""
    assert row.texts is not None, "what scores are joined to has texts"
    labels = scores.systems
    if len(labels) != len(row.texts):
        raise ValueError(f"it has {len(row.texts)} candidates, but scores of {len(labels)}")
    if scores.texts is not None:
        if scores.texts != row.texts:
            raise ValueError("the scores are of other texts")
        return list(range(len(labels)))
    if all(label is None for label in labels):
        return list(range(len(labels)))
    for names in (row.systems, tuple(map(str, range(len(labels))))):
        if set(names) == set(labels) and len(set(names)) == len(names):
            return [labels.index(name) for name in names]
    systems = ", ".join(map(str, row.systems))
    raise ValueError(f"its systems are {systems}, but the scores are of {', '.join(map(str, labels))}")


def _score_table(path: Path) -> Iterator[Row]:
    """A row of the table is one ordered pair. A pair that is given in one order only counts in both."""
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    pairs: dict[str, list[tuple[int, dict[str, str]]]] = {}
    try:
        names = [name for name in table.fieldnames or () if name not in ("id", "candidate", "reference")]
        if not {"id", "candidate", "reference"} <= set(table.fieldnames or ()) or not names:
            raise RequestError(f"{path}: must have the columns id, candidate, reference and at least one of scores")
        for record in table:
            if any(record[column] is None for column in ("id", "candidate", "reference")) or None in record:
                raise RequestError(f"{path}, line {table.line_num}: has not as many columns as the first line")
            pairs.setdefault(record["id"], []).append((table.line_num, record))
    except csv.Error as exc:
        raise RequestError(f"{path}, line {table.line_num}: is no row of a table: {exc}") from exc
    for row_id, records in pairs.items():
        labels = list(dict.fromkeys(record[end] for _, record in records for end in ("candidate", "reference")))
        try:
            matrices = {name: _matrix_of_pairs(name, labels, records) for name in names}
        except ValueError as exc:
            yield BadRow(row_id, records[0][0], str(exc))
            continue
        yield CandidateRow(row_id, records[0][0], None, (1.0,) * len(labels), tuple(labels), matrices)


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
        pair = place[record["candidate"]], place[record["reference"]]
        if not np.isnan(matrix[pair]):
            raise ValueError(f"line {line}: a second {name} of {record['candidate']!r} and {record['reference']!r}")
        matrix[pair] = score
    matrix = np.where(np.isnan(matrix), matrix.T, matrix)
    np.fill_diagonal(matrix, np.where(np.isnan(matrix.diagonal()), 1.0, matrix.diagonal()))
    for i, j in np.argwhere(np.isnan(matrix)):
        raise ValueError(f"there is no {name} of {labels[i]!r} and {labels[j]!r}")
    return matrix


def _square(name: str, rows: Sequence[Sequence[float]]) -> np.ndarray:
    if any(len(row) != len(rows) for row in rows) or not rows:
        raise ValueError(f"{name} must be a square matrix")
    return np.array(rows, dtype=np.float64)
