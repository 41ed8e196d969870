"""What a candidate's vote weighs beyond its own weight: its system, and the probability of its text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.system_weights import (
    AnsweredRow,
    CrossValidated,
    cross_validated,
    fitted_weights,
)
from ensemble_server.server.batch.votes.rows import (
    BadRow,
    CandidateRow,
    Row,
    first_finding,
    json_lines,
    read_text,
)


def read_weights(text: str) -> dict[str, float]:
    """ "ann=2,bob=0.5", or a JSON file of {"ann": 2, "bob": 0.5}. Raises `RequestError` saying what is wrong."""
    path = Path(text)
    if "=" not in text or path.is_file():
        try:
            pairs = json.loads(read_text(path))
        except json.JSONDecodeError as exc:
            raise RequestError(f"{path}, line {exc.lineno}: is not JSON: {exc.msg}") from exc
        if not isinstance(pairs, dict):
            raise RequestError(f'{path}: must map systems to weights, as in {{"ann": 2}}')
    else:
        pairs = {name: weight for name, _, weight in (part.strip().rpartition("=") for part in text.split(","))}
    weights = {}
    for name, value in pairs.items():
        try:
            weights[name] = float(value)
        except (TypeError, ValueError):
            raise RequestError(f"the weight of {name!r} must be a number, got {value!r}") from None
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise RequestError(f"the weight of {name!r} must be finite and not negative, got {weights[name]:g}")
    if not any(weights.values()):
        raise RequestError("at least one weight must be above zero")
    return weights


def by_system(rows: Sequence[Row], weights: Mapping[str, float]) -> list[Row]:
    """Each vote times the weight of its system, or of the system's model; those of systems without one stay.

    Raises `RequestError` for a weight of a system that no row has.
    """
    systems = systems_of(rows)
    for name in weights:
        if not any(_is_of(system, name) for system in systems):
            known = ", ".join(systems) or "none is named"
            raise RequestError(f"weights: no row has a candidate of {name!r} (systems: {known})")
    chosen = {system: _weight_of(system, weights) for system in systems}
    return [row if isinstance(row, BadRow) else weighted(row, chosen) for row in rows]


def weighted(row: CandidateRow, weights: Mapping[str, float]) -> CandidateRow:
    """`row` with each vote times the weight of its system; 1 for candidates of none and for systems without one."""
    return _times(row, [1.0 if system is None else weights.get(system, 1.0) for system in row.systems])


def by_probability(row: Row) -> Row:
    """Each vote times the probability of its text per token: exp of its nats per token.

    The normalised weighted sum of Wang et al., 2023, https://arxiv.org/abs/2203.11171. A row in which a candidate has
    none becomes a bad one.
    """
    if isinstance(row, BadRow) or row.texts is None:
        return row
    logprobs = nats_per_token(row)
    if isinstance(logprobs, BadRow):
        return logprobs
    return _times(row, [0.0 if logprob is None else math.exp(min(logprob, 0.0)) for logprob in logprobs])


def nats_per_token(row: CandidateRow) -> tuple[float | None, ...] | BadRow:
    """Of each candidate; None of one that is blank. A row in which another candidate has none is a bad one."""
    assert row.texts is not None, "only scores to replay come without texts"
    logprobs = row.logprobs or (None,) * len(row.texts)
    for number, (text, logprob) in enumerate(zip(row.texts, logprobs, strict=True)):
        if logprob is None and text.strip():
            reason = f'candidate {number} has no log-probabilities; ask the batch for logprobs, or give it a "logprob"'
            return BadRow(row.id, row.line, reason)
    return logprobs


def systems_of(rows: Iterable[Row]) -> list[str]:
    """The systems that candidates are of, in order of appearance."""
    named = (system for row in rows if isinstance(row, CandidateRow) for system in row.systems)
    return list(dict.fromkeys(system for system in named if system is not None))


class _GoldLine(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str | int | float | None = None
    custom_id: str | int | None = None
    answer: str | int | float | bool


def read_gold(path: Path, kind: AnswerKind) -> dict[str, str]:
    """Right answers by id, in canonical spelling: JSONL of {"id" or "custom_id", "answer"}; other keys do not matter.

    Raises `RequestError` with the line of one that holds none.
    """
    gold: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, value in json_lines(lines, str(path)):
            where = f"{path}, line {number}"
            if isinstance(value, BadRow):
                raise RequestError(f"{where}: {value.error}")
            try:
                line = _GoldLine.model_validate(value)
            except ValidationError as exc:
                raise RequestError(f"{where}: {first_finding(exc)}") from exc
            key = line.custom_id if line.id is None else line.id
            if key is None:
                raise RequestError(f"{where}: needs an id (or custom_id)")
            answer = {True: "yes", False: "no"}[line.answer] if isinstance(line.answer, bool) else str(line.answer)
            found = extract(answer, kind)
            if found is None:
                raise RequestError(f"{where}: no answer of the kind {kind} is found in {line.answer!r}")
            gold[str(key)] = found
    return gold


@dataclass(frozen=True)
class Fitted:
    """`rows`: those that were given, each weighed by weights that its own answer had no part in.

    `weights`: fitted to all rows whose answer is known. `worth`: what such weights gain, by cross-validation.
    """

    rows: list[Row]
    weights: dict[str, float]
    worth: CrossValidated
    num_known: int


def fitted(rows: Sequence[Row], gold: Mapping[str, str], kind: AnswerKind) -> Fitted:
    """Weights of systems fitted to the rows whose answer is known.

    Raises `RequestError` if there are too few of them, or one of them has candidates of no system.
    """
    known: dict[int, AnsweredRow] = {}
    for place, row in enumerate(rows):
        if isinstance(row, BadRow) or row.texts is None or str(row.id) not in gold:
            continue
        if any(system is None for system in row.systems):
            raise RequestError(f"row {row.id!r} names no system for some candidate, so none could be given a weight")
        answers = [(str(system), extract(text, kind)) for system, text in zip(row.systems, row.texts, strict=True)]
        known[place] = AnsweredRow(answers, gold[str(row.id)], row.weights)
    try:
        worth = cross_validated(list(known.values()))
    except ValueError as exc:
        raise RequestError(f"weights cannot be fitted: {exc}") from exc
    weights = fitted_weights(list(known.values()))
    own = dict(zip(known, worth.fold_weights, strict=True))
    return Fitted(
        rows=[
            row if isinstance(row, BadRow) else weighted(row, own.get(place, weights)) for place, row in enumerate(rows)
        ],
        weights=weights,
        worth=worth,
        num_known=len(known),
    )


def _is_of(system: str, name: str) -> bool:
    """Whether a system is the one called so, or a way of using the model called so: "mix temperature=0.7"."""
    return system == name or system.startswith(f"{name} ")


def _weight_of(system: str, weights: Mapping[str, float]) -> float:
    if system in weights:
        return weights[system]
    return next((weight for name, weight in weights.items() if _is_of(system, name)), 1.0)


def _times(row: CandidateRow, factors: Sequence[float]) -> CandidateRow:
    return replace(row, weights=tuple(own * factor for own, factor in zip(row.weights, factors, strict=True)))
