"""Formats whose calls are JSON: between tags (Hermes, Qwen), behind a marker (Mistral, Phi), bare (Llama 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.tool_formats.reader import SPACE, CallReader, MarkedReader, NotACall, Reads


class HermesReader(MarkedReader):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, repeated"""

    opens = ("<tool_call>",)

    def _section(self, marker: str) -> Reads[None]:
        yield from self._fenced_calls("</tool_call>")


class PhiReader(MarkedReader):
    """<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>, or functools[...] (Phi-4-mini)"""

    opens = ("<|tool_call|>", "functools[")

    def _section(self, marker: str) -> Reads[None]:
        yield from self._fenced_calls("<|/tool_call|>", "]")


class MistralReader(MarkedReader):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]; from version 11 of its tokenizer on
    [TOOL_CALLS]name[ARGS]{...}, repeated, with or without [CALL_ID] and [ARGS]."""

    opens = ("[TOOL_CALLS]",)

    def _section(self, marker: str) -> Reads[None]:
        yield from self._skip()
        if (yield from self._peek()) in ("[", "{"):
            yield from self._json_calls()
            return
        name = yield from self._name()
        if (yield from self._accept("[CALL_ID]")):
            yield from self._name()
        yield from self._accept("[ARGS]")
        yield from self._skip()
        if (yield from self._peek()) != "{":
            raise NotACall
        self._begin(name)
        yield from self._json_value(is_arguments=True)


class BareReader(MarkedReader):
    """{"name": ..., "parameters": {...}}, several with ";" between them, also behind <|python_tag|> (Llama 3). JSON may
    be an answer as well, so only functions that there are count, behind other text only with arguments, and not what
    is a part of other JSON."""

    opens = ("<|python_tag|>", "{", "[")
    only_known = True

    def _section(self, marker: str) -> Reads[None]:
        is_first = not self._said
        if marker.startswith("<"):
            yield from self._skip()
            yield from self._json_calls()
        elif self._said.rstrip().endswith(('":', ",", "[")):
            return
        else:
            yield from self._json_calls(marker, needs_arguments=not is_first)
        yield from self._skip(SPACE + ";")
        self._settle()


class NamedReader(CallReader):
    """The client has named the function, and a grammar makes the whole text its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._function = name

    def _read(self) -> Reads[None]:
        self._begin(self._function)
        while True:
            self._argue(self._text)
            self._text = ""
            if self._is_over:
                return
            yield


def hermes(calls: Sequence[ToolCall]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(_named(call), ensure_ascii=False)}\n</tool_call>" for call in calls)


def phi(calls: Sequence[ToolCall]) -> str:
    return f"<|tool_call|>{json.dumps([_named(call) for call in calls], ensure_ascii=False)}<|/tool_call|>"


def mistral(calls: Sequence[ToolCall]) -> str:
    return f"[TOOL_CALLS] {json.dumps([_named(call) for call in calls], ensure_ascii=False)}"


def bare(calls: Sequence[ToolCall]) -> str:
    return "; ".join(json.dumps(_named(call, "parameters"), ensure_ascii=False) for call in calls)


def _named(call: ToolCall, key: str = "arguments") -> Mapping[str, Any]:
    return {"name": call.name, key: loads(call.arguments)}
