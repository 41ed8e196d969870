"""Candidates of a vote, in the three forms that people have them in.

- candidates, one JSON object per line: {"id": ..., "prompt": ..., "candidates": ["text", {"text": ..., "weight": 2,
  "system": "b", "logprob": -0.3}]}
- the output of a batch, told by its first line: {"custom_id": ..., "response": {...}, "error": ...}. All choices of all
  lines of one custom_id are the candidates of one row, be they samples, cells of a grid, or answers of several jobs
- one file per system: a text file has one answer per line; a JSONL file has strings, or objects with "text" and "id"

A candidate that is null is an answer that never came: it keeps its place, is blank, and has no part in a vote.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.batch.results.candidates import BatchLine, grouped
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

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
NO_TEXT = "has no text to vote on"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def _as_text(value: Any) -> Any:
    return {"text": value} if isinstance(value, str | None) else value


class Candidate(Strict):
    text: str | None
    weight: float = Field(default=1.0, ge=0)
    system: str | None = None
    logprob: float | None = None


Candidates = Annotated[list[Annotated[Candidate, BeforeValidator(_as_text)]], Field(min_length=1)]


class _CandidateLine(Strict):
    id: RowId = None
    prompt: Any = None
    messages: Any = None
    candidates: Candidates


class _SystemLine(Strict):
    id: RowId = None
    text: str | None


def read_candidates(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    """Rows from the first two forms. A row without an id gets the number of its line."""
    values = json_lines(lines, name)
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
            yield BadRow(id_in(value), number, first_finding(exc))
            continue
        row_id = number if line.id is None else line.id
        yield row_of(row_id, number, line.candidates, prompt=line.messages or line.prompt)


def row_of(row_id: RowId, number: int, candidates: Sequence[Candidate], *, prompt: Any = None) -> Row:
    if all(candidate.text is None for candidate in candidates):
        return BadRow(row_id, number, NO_TEXT)
    return CandidateRow(
        row_id,
        number,
        tuple(candidate.text or "" for candidate in candidates),
        tuple(candidate.weight for candidate in candidates),
        tuple(candidate.system for candidate in candidates),
        logprobs=tuple(candidate.logprob for candidate in candidates),
        prompt=prompt,
    )


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
            yield BadRow(id_in(value), number, first_finding(exc))
    for group in grouped(readable):
        if group.texts:
            yield CandidateRow(
                group.custom_id,
                group.line,
                tuple(group.texts),
                (1.0,) * len(group.texts),
                tuple(group.systems),
                logprobs=tuple(group.logprobs),
            )
        else:
            yield BadRow(group.custom_id, group.line, group.failure or NO_TEXT)


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
    return [
        CandidateRow(row_id, number, tuple(row), weights, tuple(names))
        for number, (row_id, row) in enumerate(zip(ids, texts, strict=True), start=1)
    ]


def _system_answers(path: Path) -> list[tuple[RowId, str]]:
    if path.suffix.lower() not in JSON_SUFFIXES:
        # str.splitlines would also split at U+2028 and its like
        lines = io.StringIO(read_text(path), newline=None)
        return [(None, line.rstrip("\n").removeprefix("\ufeff")) for line in lines]
    answers = []
    with path.open("rb") as lines:
        for number, value in json_lines(lines, str(path)):
            if isinstance(value, BadRow):
                raise RequestError(f"{path}, line {number}: {value.error}")
            try:
                line = _SystemLine.model_validate(_as_text(value))
            except ValidationError as exc:
                raise RequestError(f"{path}, line {number}: {first_finding(exc)}") from exc
            answers.append((line.id, line.text or ""))
    return answers
