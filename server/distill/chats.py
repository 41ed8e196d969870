"""Prompts that the teacher answers before anybody is taught: read from files, checked, the last of each held out.

A line is `{"messages": [...]}` as OpenAI has them, or `{"prompt": "text"}`, which a user says; an `id` or `custom_id`
beside it is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.errors import ConfigError, RequestError
from ensemble_server.server.batch.source.records import BadRecord, read_records
from ensemble_server.server.compare.kept.content_cache import file_sha256
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.requests.errors import checked
from ensemble_server.server.requests.messages import template_messages
from ensemble_server.server.requests.protocol import ChatBody

FORM = '{"messages": [...]} or {"prompt": "text"}'
_KEYS = ("messages", "prompt", "id", "custom_id")
_BODY: TypeAdapter[ChatBody] = TypeAdapter(ChatBody)


@dataclass(frozen=True)
class Prompt:
    """`asked`: its messages as a client would send them; `messages`: as templates take them."""

    file: str
    line: int
    asked: tuple[Mapping[str, Any], ...]
    messages: tuple[Message, ...]
    is_held_out: bool = False

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def text(self) -> str:
        return "\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Prompts:
    """`sha256`: of each file, in their order. `repeats`: by file, prompts left out: another line holds them out."""

    prompts: tuple[Prompt, ...] = ()
    sha256: tuple[str, ...] = ()
    repeats: Mapping[str, int] = field(default_factory=dict)

    def texts(self, *, held_out: bool) -> list[str]:
        return [prompt.text for prompt in self.prompts if prompt.is_held_out == held_out]


def read_prompts(paths: Sequence[Path], *, held_out: float) -> Prompts:
    """`held_out`: the last part of each file's prompts. One that is held out is taught nowhere.

    Raises `ConfigError` that names the line which is no prompt, or if nothing is left to be taught or to be held out.
    """
    if not paths:
        return Prompts()
    prompts: list[Prompt] = []
    for path in paths:
        try:
            found = list(_prompts(path))
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
        num_kept = min(len(found) - 1, max(1, round(held_out * len(found))))
        border = len(found) - num_kept
        prompts += [replace(prompt, is_held_out=place >= border) for place, prompt in enumerate(found)]
    kept = {_content(prompt) for prompt in prompts if prompt.is_held_out}
    repeated = [prompt for prompt in prompts if not prompt.is_held_out and _content(prompt) in kept]
    repeats = {path.name: sum(prompt.file == path.name for prompt in repeated) for path in paths}
    left = tuple(prompt for prompt in prompts if prompt.is_held_out or _content(prompt) not in kept)
    if not kept or all(prompt.is_held_out for prompt in left):
        raise ConfigError(
            f"chat: {held_out:.0%} at the end of each file is held out, which leaves nothing to "
            f"{'teach' if kept else 'hold out'}; give at least two prompts that differ"
        )
    return Prompts(left, tuple(file_sha256(path) for path in paths), repeats)


def _prompts(path: Path) -> Iterator[Prompt]:
    is_empty = True
    for record in read_records(path, "jsonl"):
        is_empty = False
        at = f"{path}, line {record.line}"
        if isinstance(record, BadRecord):
            raise ConfigError(f"{at}: {record.error}; each line must be {FORM}")
        try:
            yield _prompt(path.name, record.line, record.values)
        except RequestError as exc:
            raise ConfigError(f"{at}: {exc}") from exc
    if is_empty:
        raise ConfigError(f"{path}: is empty; there is no prompt to answer")


def _prompt(file: str, line: int, values: Mapping[str, Any]) -> Prompt:
    """Raises `RequestError`."""
    for key in values:
        if key not in _KEYS:
            raise RequestError(f"unknown field {key!r}{nearest(key, _KEYS)}; a line is {FORM}")
    if ("messages" in values) == ("prompt" in values):
        raise RequestError(f"must be {FORM}, and has {'both' if 'prompt' in values else 'neither'}")
    messages = values.get("messages")
    if "prompt" in values:
        if not isinstance(values["prompt"], str) or not values["prompt"].strip():
            raise RequestError(f"prompt must be a text that is not empty, got {values['prompt']!r:.60}")
        messages = [{"role": "user", "content": values["prompt"]}]
    body = checked(_BODY, {"messages": messages})
    plain = template_messages(body.messages)
    if plain[-1]["role"] == "assistant":
        raise RequestError("the last message is the assistant's already; end with what it is to answer")
    return Prompt(file, line, tuple(messages or ()), plain)


def _content(prompt: Prompt) -> str:
    return json.dumps(prompt.messages, sort_keys=True, default=str)
