"""Formats that write arguments one by one between tags: Qwen3-Coder and GLM.

Values stand there without quotes, so the function's schema says whether 3 is a number or a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.tool_formats.reader import Ending, MarkedReader, NotACall, Reads

_AFTER_PARAMETER = ("<parameter=", "</function>", "</tool_call>", "<tool_call>")
_ENDS_OF_PARAMETER = (
    Ending("\n</parameter>", _AFTER_PARAMETER),
    Ending("</parameter>", _AFTER_PARAMETER),
    Ending("\n</function>", ("</tool_call>",), is_next=True),  # where the end of the parameter was forgotten
)
_END_OF_VALUE = Ending("</arg_value>", ("<arg_key>", "</tool_call>"))


class Qwen3CoderReader(MarkedReader):
    """<tool_call><function=name><parameter=key>\\nvalue\\n</parameter></function></tool_call>; the outer tag is
    sometimes left out, and so is the end of a parameter."""

    opens = ("<tool_call>", "<function=")

    def _section(self, marker: str) -> Reads[None]:
        if marker == "<tool_call>":
            yield from self._skip()
            yield from self._expect("<function=")
        name = yield from self._name()
        yield from self._expect(">")
        self._begin(name)
        keys = tuple(f"{key}>" for key in self._keys_of(name))
        endings = (*_ENDS_OF_PARAMETER, *([Ending("\n<parameter=", keys, is_next=True)] if keys else ()))
        while True:
            yield from self._skip()
            if not (yield from self._accept("<parameter=")):
                break
            key, _ = yield from self._until(">")
            yield from self._accept("\r\n", "\n")
            self._argument(key)
            yield from self._written_value(name, key, *endings)
        yield from self._accept("</function>")
        self._end_arguments()
        yield from self._close("</tool_call>")


class GlmReader(MarkedReader):
    """<tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> </tool_call>"""

    opens = ("<tool_call>",)

    def _section(self, marker: str) -> Reads[None]:
        yield from self._skip()
        name = yield from self._name()
        yield from self._skip()
        tag = yield from self._expect("<arg_key>", "</tool_call>")
        self._begin(name)
        while tag == "<arg_key>":
            key, _ = yield from self._until("</arg_key>")
            yield from self._skip()
            if not (yield from self._accept("<arg_value>")):
                raise NotACall
            self._argument(key.strip())
            yield from self._written_value(name, key.strip(), _END_OF_VALUE)
            yield from self._skip()
            tag = yield from self._accept("<arg_key>", "</tool_call>")
        self._end_arguments()


def qwen3_coder(calls: Sequence[ToolCall]) -> str:
    written = []
    for call in calls:
        parameters = [
            f"<parameter={key}>\n{_shown(value)}\n</parameter>\n" for key, value in loads(call.arguments).items()
        ]
        written.append(f"<tool_call>\n<function={call.name}>\n{''.join(parameters)}</function>\n</tool_call>")
    return "\n".join(written)


def glm(calls: Sequence[ToolCall]) -> str:
    written = []
    for call in calls:
        arguments = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{_shown(value)}</arg_value>\n"
            for key, value in loads(call.arguments).items()
        ]
        written.append(f"<tool_call>{call.name}\n{''.join(arguments)}</tool_call>")
    return "\n".join(written)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
