"""Tool calls: out of a model's text into OpenAI's form, and into a grammar where a call is forced.

How a model writes a call is a habit of its training, and its chat template shows which one:

    hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>, repeated      Hermes, Qwen
    llama3_json   {"name": ..., "parameters": {...}}, alone or joined by ";"              Llama 3.1 and later
    mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]                    Mistral

Parsers take text as it streams and give text and calls; where the text is cut makes no difference. What looks like a
call and is none comes out as the text that it was.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ensemble_server.ensembles.base import Grammar

ToolFormat = Literal["hermes", "llama3_json", "mistral"]


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of tool call `index`. The first one has the `name`; `arguments` are joined."""

    index: int
    name: str | None
    arguments: str


Piece = str | ToolCallDelta


def tool_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it is none of those known here."""
    if "<tool_call>" in chat_template and "<function=" not in chat_template and "<arg_key>" not in chat_template:
        return "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<|start_header_id|>" in chat_template and '"parameters"' in chat_template:
        return "llama3_json"
    return None


# --- from text ----------------------------------------------------------------------------------------------------


class ToolCallParser(ABC):
    """Reads one choice's text. With `parallel` false calls after the first are dropped."""

    def __init__(self, *, parallel: bool = True) -> None:
        self._parallel = parallel
        self._num_calls = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    @abstractmethod
    def feed(self, text: str) -> list[Piece]:
        """What is certain once `text` has come."""

    @abstractmethod
    def close(self) -> list[Piece]:
        """The rest, when no more text comes."""

    def _calls(self, calls: Sequence[tuple[str, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for name, arguments in calls:
            if self._parallel or not self._num_calls:
                pieces.append(ToolCallDelta(self._num_calls, name, arguments))
            self._num_calls += 1
        return pieces


class HermesParser(ToolCallParser):
    """White space around calls is dropped."""

    _OPEN = "<tool_call>"
    _CLOSE = "</tool_call>"

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel)
        self._held = ""
        self._space = ""  # before the call that is being read
        self._is_in_call = False
        self._is_after_call = False  # and nothing was said since

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            before, marker, after = self._held.partition(self._CLOSE if self._is_in_call else self._OPEN)
            if not self._is_in_call:
                before = before.lstrip() if self._is_after_call else before
                shown = before.rstrip() if marker else before[: len(before) - _held_back(before, self._OPEN)]
                if shown:
                    pieces.append(shown)
                    self._is_after_call = False
                if not marker:
                    self._held = before[len(shown) :]
                    return pieces
                self._space = before[len(shown) :]
            elif not marker:
                return pieces
            else:
                pieces += self._body(before, marker)
            self._held = after
            self._is_in_call = not self._is_in_call

    def close(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._is_in_call:  # models leave the closing tag out when the call ends their answer
            return self._body(held, "")
        held = held.lstrip() if self._is_after_call else held
        return [held] if held else []

    def _body(self, body: str, close: str) -> list[Piece]:
        calls = read_calls(body)
        self._is_after_call = calls is not None
        return [self._space + self._OPEN + body + close] if calls is None else self._calls(calls)


class WholeAnswerParser(ToolCallParser):
    """The whole answer is calls, or none of it is: what begins like a call is held to its end and read at once."""

    _BEGINNINGS = ("{", "<|python_tag|>")

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel)
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        start = self._held.lstrip()
        if not self._is_text and any(start.startswith(begin) or begin.startswith(start) for begin in self._BEGINNINGS):
            return []
        self._is_text = True
        return self._release()

    def close(self) -> list[Piece]:
        calls = read_calls(self._held.strip().removeprefix("<|python_tag|>"))
        return self._release() if calls is None else self._calls(calls)

    def _release(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [held] if held else []


class RestOfAnswerParser(ToolCallParser):
    """A marker turns the rest of the answer into calls. White space before calls is dropped."""

    _MARKER = "[TOOL_CALLS]"

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel)
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        before, marker, _ = self._held.partition(self._MARKER)
        shown = before.rstrip() if marker else before[: len(before) - _held_back(before, self._MARKER)]
        self._held = self._held[len(shown) :]
        return [shown] if shown else []

    def close(self) -> list[Piece]:
        held, self._held = self._held, ""
        calls = read_calls(held.strip().removeprefix(self._MARKER))
        if calls is None:
            return [held] if held else []
        return self._calls(calls)


class NamedCallParser(ToolCallParser):
    """The client named the function, and a grammar makes the whole text its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def feed(self, text: str) -> list[Piece]:
        if self.has_called:
            return [ToolCallDelta(0, None, text)] if text else []
        return self._calls([(self._name, text)])

    def close(self) -> list[Piece]:
        return [] if self.has_called else self.feed("")


def parser_for(form: ToolFormat, *, parallel: bool) -> ToolCallParser:
    match form:
        case "hermes":
            return HermesParser(parallel=parallel)
        case "llama3_json":
            return WholeAnswerParser(parallel=parallel)
        case "mistral":
            return RestOfAnswerParser(parallel=parallel)


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """(name, arguments) of each call in JSON `text`; None if it is anything but calls.

    '{"name": "f", "parameters": {"x": 1}}; {"name": "g"}' -> [("f", '{"x": 1}'), ("g", "{}")]
    """
    values: list[Any] = []
    while text := text.lstrip(" \t\r\n;,"):
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]
        text = text[end:]
    calls = [_read_call(value) for value in values]
    return [call for call in calls if call] if calls and all(calls) else None


def _read_call(value: Any) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as JSON inside JSON
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return None
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _held_back(text: str, marker: str) -> int:
    """Length of the end of `text` that may be white space before `marker` or its beginning: ("a <to", "<tool") -> 4"""
    begun = next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())


# --- into a grammar -----------------------------------------------------------------------------------------------


def named_call_grammar(parameters: Mapping[str, Any] | None) -> Grammar:
    """The arguments of one function, and nothing else."""
    return Grammar("json_schema", json.dumps(parameters or {"type": "object"}))


def required_call_grammar(functions: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Grammar:
    """One call of any of `functions`, pairs of name and JSON schema: {"name": ..., "arguments": {...}}"""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": _moved(parameters or {"type": "object"}, f"#/anyOf/{place}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, (name, parameters) in enumerate(functions)
    ]
    return Grammar("json_schema", json.dumps({"anyOf": calls}))


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its references into itself rewritten for its new place in a larger one."""
    match schema:
        case dict():
            return {
                key: root + value[1:]
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, root)
                for key, value in schema.items()
            }
        case list():
            return [_moved(value, root) for value in schema]
    return schema
