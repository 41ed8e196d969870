"""Gemma's formats: call:name{key:value}, where texts stand between quotes that are tokens of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.tool_formats.reader import Ending, MarkedReader, NotACall, Reads
from ensemble_server.server.tool_formats.values import typed, types_of

_QUOTES = ("<escape>", '<|"|>')
_MAX_DEPTH = 32


class GemmaReader(MarkedReader):
    """<|tool_call>call:name{key:<|"|>text<|"|>,other:3}<tool_call|> (Gemma 4), and the same between
    <start_function_call> and <end_function_call>, with <escape> for quotes (FunctionGemma)."""

    opens = ("<|tool_call>", "<start_function_call>")

    def _section(self, marker: str) -> Reads[None]:
        yield from self._skip()
        yield from self._accept(":")  # which models write there, too
        yield from self._expect("call:")
        name = yield from self._name()
        yield from self._skip()
        yield from self._expect("{")
        self._begin(name)
        try:
            yield from self._arguments(name)
        except NotACall:
            if not self._is_over:
                raise
            if not self._num_arguments:
                self._argue("{")
            self._at = len(self._text)  # a key or a value that was cut off
            self._settle()
            return
        self._end_arguments()
        if not self._is_cut_off:
            yield from self._close("<tool_call|>", "<end_function_call>")

    def _arguments(self, name: str) -> Reads[None]:
        while True:
            yield from self._skip(" \t\r\n,")
            if not (yield from self._peek()) or (yield from self._accept("}")):
                return
            key = yield from self._key()
            schema = self._schema_of(name, key)
            types = types_of(schema)
            yield from self._skip()
            if (not types or "string" in types) and (quote := (yield from self._accept(*_QUOTES))):
                self._argument(key)
                yield from self._text_value(Ending(quote))
                continue
            value = yield from self._value(0)
            if isinstance(value, str) and types and "string" not in types:
                value = typed(value, schema)
            elif types == {"string"} and not isinstance(value, str):
                value = json.dumps(value, ensure_ascii=False)
            self._argument(key)
            self._argue(json.dumps(value, ensure_ascii=False))
            self._settle()

    def _key(self) -> Reads[str]:
        if quote := (yield from self._accept(*_QUOTES)):
            key, _ = yield from self._until(quote)
            yield from self._skip()
            yield from self._expect(":")
            return key
        if (yield from self._peek()) == '"':
            key = yield from self._json_string()
            yield from self._skip()
            yield from self._expect(":")
            return key
        key, end = yield from self._until(":")
        if not end:
            raise NotACall
        return key.strip()

    def _value(self, depth: int) -> Reads[Any]:
        yield from self._skip()
        if depth > _MAX_DEPTH:
            raise NotACall
        if quote := (yield from self._accept(*_QUOTES)):
            text, end = yield from self._until(quote)
            if not end:
                raise NotACall
            return text
        match (yield from self._peek()):
            case "{":
                self._at += 1
                members: dict[str, Any] = {}
                while not (yield from self._is_closed("}")):
                    key = yield from self._key()
                    members[key] = yield from self._value(depth + 1)
                return members
            case "[":
                self._at += 1
                items: list[Any] = []
                while not (yield from self._is_closed("]")):
                    items.append((yield from self._value(depth + 1)))
                return items
            case '"':
                return (yield from self._json_string())
        text, end = yield from self._until(",", "}", "]")
        if not end:
            raise NotACall
        self._at -= len(end)
        return typed(text.strip(), None)

    def _is_closed(self, bracket: str) -> Reads[bool]:
        yield from self._skip(" \t\r\n,")
        if not (yield from self._peek()):
            raise NotACall
        return bool((yield from self._accept(bracket)))


def gemma(calls: Sequence[ToolCall]) -> str:
    return "".join(f"<|tool_call>call:{call.name}{_written(loads(call.arguments))}<tool_call|>" for call in calls)


def _written(value: Any) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
        case list():
            return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)
