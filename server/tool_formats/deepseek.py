"""DeepSeek's formats, whose tags have bars of their own: JSON up to V3.1, then one parameter after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.tool_formats.reader import Ending, MarkedReader, NotACall, Reads

_CALLS, _END_OF_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _END_OF_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_MARK = "｜DSML｜"
_BLOCKS = (f"<{_MARK}tool_calls>", f"<{_MARK}function_calls>")
_ENDS_OF_BLOCKS = (f"</{_MARK}tool_calls>", f"</{_MARK}function_calls>")
_PARAMETER, _END_OF_INVOKE = f'<{_MARK}parameter name="', f"</{_MARK}invoke>"
_END_OF_PARAMETER = Ending(f"</{_MARK}parameter>", (_PARAMETER, _END_OF_INVOKE, *_ENDS_OF_BLOCKS))


class DeepSeekReader(MarkedReader):
    """V3.1: <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜> between <｜tool▁calls▁begin｜> and its end;
    V3 and R1: "function" before the separator, and behind it the name and the arguments in a block of code;
    V3.2: <｜DSML｜invoke name="..."><｜DSML｜parameter name="..." string="true">...</｜DSML｜parameter>
    """

    opens = (_CALLS, _CALL, *_BLOCKS)

    def _section(self, marker: str) -> Reads[None]:
        if marker in _BLOCKS:
            yield from self._block()
            return
        if marker == _CALLS:
            yield from self._skip()
            yield from self._expect(_CALL)
        while True:
            yield from self._json()
            yield from self._skip()
            next_tag = yield from self._accept(_CALL, _END_OF_CALLS)
            if next_tag:
                self._settle()
            if next_tag != _CALL:
                return

    def _json(self) -> Reads[None]:
        """What stands behind the beginning of a call."""
        yield from self._skip()
        name = yield from self._name()
        yield from self._expect(_SEPARATOR)
        yield from self._skip()
        if (yield from self._peek()) != "{":
            name = yield from self._name()
            yield from self._skip()
            yield from self._accept("```json")
            yield from self._skip()
        if (yield from self._peek()) != "{":
            raise NotACall
        self._begin(name)
        yield from self._json_value(is_arguments=True)
        yield from self._skip()
        yield from self._accept("```")
        yield from self._close(_END_OF_CALL)

    def _block(self) -> Reads[None]:
        has_any = False
        while True:
            yield from self._skip()
            tag = yield from self._accept(f'<{_MARK}invoke name="', *_ENDS_OF_BLOCKS)
            if not tag.endswith('"'):
                if tag and has_any:
                    self._settle()
                return
            name = yield from self._name()
            yield from self._expect('">')
            self._begin(name)
            has_any = True
            while True:
                yield from self._skip()
                if not (yield from self._accept(_PARAMETER)):
                    break
                key, _ = yield from self._until('"')
                attributes, _ = yield from self._until(">")
                self._argument(key)
                if 'string="false"' in attributes:
                    yield from self._written_value("", key, _END_OF_PARAMETER)
                else:
                    yield from self._text_value(_END_OF_PARAMETER)
            yield from self._accept(_END_OF_INVOKE)
            self._end_arguments()


def deepseek(calls: Sequence[ToolCall]) -> str:
    written = [
        f"{_CALL}{call.name}{_SEPARATOR}{json.dumps(loads(call.arguments), ensure_ascii=False)}{_END_OF_CALL}"
        for call in calls
    ]
    return f"{_CALLS}{''.join(written)}{_END_OF_CALLS}"
