"""The columns of a table of answers: where in a line of results each finds its value.

A line is one of a batch output, where short names stand for what people want most and any other path leads into the
response's body (or into the line itself: "response.status_code"); or a line of another file of results, such as
`ensemble vote` writes, where every path leads into the line. `content|number` extracts an answer from a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.server.config.problems import nearest

ABSENT: Any = object()  # what a line has no place for, which is not the same as null

CELL_NAMES = ("model", "temperature", "seed")
ID_SOURCES = ("custom_id", "id")
SHORT_NAMES = ("custom_id", "content", "finish_reason", "error", "sample", *CELL_NAMES)
BODY_NAMES = (
    "id",
    "object",
    "created",
    "choices",
    "usage",
    "ensemble",
    "system_fingerprint",
    "data",
    "label",
    "probabilities",
    "members",
    "vote",
)
LINE_NAMES = ("response", "cell")
ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)


@dataclass(frozen=True)
class Column:
    """`source`: a short name or a dotted path. `answer`: the kind of answer that is extracted from the text there."""

    name: str
    source: str
    answer: AnswerKind | None = None

    @property
    def is_answer(self) -> bool:
        """Whether it shows something of the answer, so that a row without one leaves it blank."""
        return self.source == "content" or self.source not in (*SHORT_NAMES, "id", "winner")

    def value(self, line: Mapping[str, Any], sample: int) -> Any:
        """Its value for choice `sample` of a line; `ABSENT` if the line has no such place."""
        found = _batch_value(line, self.source, sample) if is_batch_line(line) else _at(line, self.source)
        if self.answer is not None and isinstance(found, str):
            return extract(found, self.answer)
        return found


def parse_columns(text: str) -> tuple[Column, ...]:
    """ "id=custom_id,prediction=content|number" -> two columns; a part without "=" is named as its source.

    Raises `ConfigError`.
    """
    columns = []
    for part in text.split(","):
        name, has_source, source = part.partition("=")
        path, has_kind, kind = (source if has_source else name).strip().partition("|")
        if not path or not name.strip():
            raise ConfigError(f"--columns: must be NAME=SOURCE,..., got {text!r}")
        if has_kind and kind not in ANSWER_KINDS:
            raise ConfigError(f"--columns: {path}|{kind}: no such kind of answer{nearest(kind, ANSWER_KINDS)}")
        columns.append(Column(name.strip() if has_source else path, path, kind or None))  # type: ignore[arg-type]
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise ConfigError(f"--columns: names must differ, got {', '.join(names)}")
    return tuple(columns)


def check_batch_columns(columns: Sequence[Column]) -> None:
    """Raise `ConfigError` for sources that no line of a batch output can have."""
    known = (*SHORT_NAMES, *BODY_NAMES, *LINE_NAMES)
    for column in columns:
        if (first := column.source.partition(".")[0]) not in known:
            raise ConfigError(f"--columns: {column.source!r} is nothing that an answer has{nearest(first, known)}")


def is_batch_line(line: Mapping[str, Any]) -> bool:
    return "custom_id" in line and ("response" in line or "error" in line)


def is_failed(line: Mapping[str, Any]) -> bool:
    return line.get("error") is not None


def num_samples(line: Mapping[str, Any]) -> int:
    """How many choices a line has; 1 for all that has none."""
    choices = _at(line, "response.body.choices")
    return max(1, len(choices)) if isinstance(choices, list) else 1


def content_of(choice: Mapping[str, Any]) -> str | None:
    """The text of one choice of a chat or a completion."""
    message = choice.get("message")
    return message.get("content") if isinstance(message, Mapping) else choice.get("text")


def cell_text(value: Any) -> str:
    """A value as a CSV has it: null is blank, what is no single value is JSON."""
    match value:
        case None:
            return ""
        case str():
            return value
        case _ if value is ABSENT:
            return ""
    return json.dumps(value, ensure_ascii=False)


def _batch_value(line: Mapping[str, Any], source: str, sample: int) -> Any:
    choices = _at(line, "response.body.choices")
    choice = choices[sample] if isinstance(choices, list) and sample < len(choices) else ABSENT
    match source:
        case "custom_id":
            return line["custom_id"]
        case "error":
            return _at(line, "error.message") if is_failed(line) else None
        case "sample":
            return sample
        case "content":
            return ABSENT if choice is ABSENT else content_of(choice)
        case "finish_reason":
            return ABSENT if choice is ABSENT else choice.get("finish_reason")
        case _ if source in CELL_NAMES and (in_cell := _at(line, f"cell.{source}")) is not ABSENT:
            return in_cell
    found = _at(line, f"response.body.{source}")
    return _at(line, source) if found is ABSENT else found


def _at(value: Any, path: str) -> Any:
    """({"a": [{"b": 1}]}, "a.0.b") -> 1"""
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return ABSENT
    return value
