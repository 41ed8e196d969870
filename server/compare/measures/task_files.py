"""Tasks read from JSONL: a row's fields go through templates into a prompt and its right answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, RequestError
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.batch.source.template import PromptTemplate
from ensemble_server.server.compare.measures.task_measure import Item, Metric, Task
from ensemble_server.server.compare.measures.task_metrics import unreadable_reference

CHOICES_FIELDS = ("choices", "options")  # where the options of a multiple choice stand, first that is there

_ONE_FIELD = re.compile(r"\s*\{\{-?\s*([A-Za-z_]\w*)\s*-?\}\}\s*")


def read_task(
    name: str,
    data: Path,
    *,
    metric: Metric,
    template: str,
    answer: str = "{{ answer }}",
    limit: int | None = None,
    **settings: Any,
) -> Task:
    """The task in a JSONL file. `template` and `answer` are Jinja over each row's fields; `settings` are `Task`'s.

    If `answer` is one field alone and it holds a list, each of its elements is right (of the metric `json` a list is
    the answer itself). What `judge` compares needs no answer. A row's id is its field `id`, else its number from 0. A
    multiple choice finds its options in the field `choices`, else `options`, and the right one by its text, its letter
    or its number from 0. Raises `ConfigError` naming the file, the line and the rule.
    """
    prompts = PromptTemplate(template, name=f"tasks.{name}.template")
    answers = PromptTemplate(answer, name=f"tasks.{name}.answer")
    items: dict[str, Item] = {}
    for number, (line, row) in enumerate(rows_of(data)):
        if limit is not None and number >= limit:
            break
        try:
            item = _item(row, str(row.get("id", number)), prompts, answers, metric)
        except (RequestError, ValueError) as exc:
            raise ConfigError(f"{data}, line {line}: {exc}") from exc
        if item.id in items:
            raise ConfigError(f"{data}, line {line}: the id {item.id!r} is taken already; ids must differ")
        items[item.id] = item
    if not items:
        raise ConfigError(f"{data}: has no rows; a task needs at least one")
    return Task(name, tuple(items.values()), metric, **settings)


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: must be UTF-8 text, byte {exc.start} is not") from exc
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except ValueError as exc:
            raise ConfigError(f"{path}, line {number}: is not JSON ({exc})") from exc
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: must be an object")
        yield number, row


def _item(
    row: Mapping[str, Any], item_id: str, prompts: PromptTemplate, answers: PromptTemplate, metric: Metric
) -> Item:
    prompt = prompts.render(row)
    if not prompt.strip():
        raise ValueError("the prompt is blank")
    field = _ONE_FIELD.fullmatch(answers.source)
    value = row.get(field.group(1)) if field else None
    if metric == "judge":
        return Item(item_id, prompt, ("",))
    if metric == "json" and value is not None and not isinstance(value, str):
        references: tuple[str, ...] = (json.dumps(value),)
    else:
        references = tuple(str(one) for one in value) if isinstance(value, list) else (answers.render(row),)
    if not references:
        raise ValueError("has no right answer")
    if metric in ("multiple_choice", "multiple_choice_per_byte"):
        choices = _choices(row)
        return Item(item_id, prompt, (choices[_right_choice(references[0], choices)],), choices)
    if (bad := unreadable_reference(metric, references)) is not None:
        raise ValueError(f"no answer that {metric} could match is found in {bad!r}")
    return Item(item_id, prompt, references)


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    field = next((name for name in CHOICES_FIELDS if name in row), None)
    if field is None:
        raise ValueError(f"multiple choice needs a list of options in the field {' or '.join(CHOICES_FIELDS)}")
    choices = row[field]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{field} must be a list of texts that are not empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"{field} must hold at least two options, all different")
    return tuple(choices)


def _right_choice(answer: str, choices: Sequence[str]) -> int:
    """("B", ["7", "9"]) -> 1, ("9", ["7", "9"]) -> 1, ("1", ["seven", "nine"]) -> 1"""
    answer = answer.strip()
    if answer in choices:
        return choices.index(answer)
    index = ord(answer) - ord("A") if len(answer) == 1 and "A" <= answer <= "Z" else -1
    if answer.isdecimal():
        index = int(answer)
    if not 0 <= index < len(choices):
        raise ValueError(f"the answer {answer!r} is none of the {len(choices)} options, by text, letter or number")
    return index
