"""Answers that are there already, judged as if they had just been given: of a batch, of a vote, of another program.

One JSON object a line, told by its first line: the output of `ensemble batch` (all choices of one system under one
custom_id are samples of its item), the output of `ensemble vote`, or anything else with {"id", "text"}. An item
without an answer counts as wrong, as one that failed does. What was asked is not in such files, so nobody can check
that it was the task's prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemble_server.ensembles.errors import ConfigError, RequestError, UnsupportedError
from ensemble_server.server.batch.results.candidates import BatchLine, grouped
from ensemble_server.server.batch.votes.rows import BadRow, json_lines
from ensemble_server.server.compare.measures.task_measure import (
    CHOICE_METRICS,
    Item,
    ItemScore,
    Sample,
    Task,
    item_score,
)
from ensemble_server.server.compare.measures.task_metrics import GenerationMetric, judge
from ensemble_server.server.config.problems import nearest


@dataclass(frozen=True)
class Recorded:
    """The samples of one item, and the tokens that were written for all of them (0 where nobody says)."""

    texts: tuple[str, ...]
    completion_tokens: int = 0
    error: str | None = None


def read_recorded(path: Path, system: str | None = None) -> dict[str, Recorded]:
    """By id. `system`: whose answers, where a batch asked several.

    Raises `ConfigError` that names the file, and the line where there is one.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            lines = _checked(json_lines(file, str(path)), path)
            first = next(lines, None)
            if first is None:
                return {}
            everything = chain([first], lines)
            if BatchLine.is_one(first[1]):
                return _of_batch(everything, path, system)
            if system is not None:
                raise ConfigError(f"{path} is no output of a batch, so that nothing in it is of the system {system!r}")
            return _of_lines(everything, path)
    except (OSError, RequestError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def score_recorded(task: Task, recorded: Mapping[str, Recorded]) -> list[ItemScore]:
    """Every item of `task`, in its order. Raises `UnsupportedError` if it is judged by likelihoods."""
    metric = task.metric
    if metric in CHOICE_METRICS:
        raise UnsupportedError(f"{metric} compares likelihoods, which recorded answers do not have")
    return [_scored(task, metric, item, recorded.get(item.id, _MISSING)) for item in task.items]


_MISSING = Recorded((), error="no answer to it was recorded")


def _scored(task: Task, metric: GenerationMetric, item: Item, recorded: Recorded) -> ItemScore:
    samples = []
    for number, text in enumerate(recorded.texts):
        found, score = judge(metric, text, item.references)
        samples.append(Sample(text, found, score, recorded.completion_tokens if number == 0 else 0))
    return item_score(task, item, samples or [Sample("", None, 0.0, 0, recorded.error or "it has no text")])


def _checked(lines: Iterable[tuple[int, Any]], path: Path) -> Iterator[tuple[int, Any]]:
    for number, value in lines:
        if isinstance(value, BadRow):
            raise ConfigError(f"{path}, line {number}: {value.error}")
        yield number, value


def _of_batch(lines: Iterable[tuple[int, Any]], path: Path, system: str | None) -> dict[str, Recorded]:
    read, num_tokens, systems = [], dict[str, int](), set[str]()
    for number, value in lines:
        try:
            line = BatchLine.model_validate(value)
        except ValidationError as exc:
            raise ConfigError(f"{path}, line {number}: is no line of a batch output: {exc}") from exc
        systems.add(line.system or "")
        if system is not None and line.system != system:
            continue
        read.append((number, line))
        num_tokens[str(line.custom_id)] = num_tokens.get(str(line.custom_id), 0) + _tokens_of(value)
    systems.discard("")  # of rows that failed where the job asked one system alone
    if system is None and len(systems) > 1:
        raise ConfigError(f"{path} has answers of {', '.join(sorted(systems))}; say whose with `system`")
    if system is not None and system not in systems:
        raise ConfigError(f"{path} has no answers of {system!r}{nearest(system, sorted(systems))}")
    return {
        str(group.custom_id): Recorded(tuple(group.texts), num_tokens.get(str(group.custom_id), 0), group.failure)
        for group in grouped(read)
    }


def _tokens_of(line: Mapping[str, Any]) -> int:
    """Written by all members together."""
    body = (line.get("response") or {}).get("body") or {}
    return int((body.get("usage") or {}).get("completion_tokens") or 0)


def _of_lines(lines: Iterable[tuple[int, Any]], path: Path) -> dict[str, Recorded]:
    found: dict[str, Recorded] = {}
    for number, value in lines:
        if not isinstance(value, Mapping) or "id" not in value or not {"text", "error"} & value.keys():
            raise ConfigError(
                f"{path}, line {number}: must be a line of a batch output, or an object with `id` and `text`"
            )
        text, error = value.get("text"), value.get("error")
        name = str(value["id"])
        if name in found:
            raise ConfigError(f"{path}, line {number}: the id {name!r} stands there twice")
        found[name] = Recorded(() if text is None else (str(text),), error=None if error is None else str(error))
    return found
