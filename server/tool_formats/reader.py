"""What the readers of all formats share: a model's text in as it streams, text and pieces of calls out.

A reader is a generator that takes its text by `_accept`, `_until` and the like, and is suspended where it needs more of
it, so that a format reads from top to bottom however the text is cut. It commits to a call as soon as it knows the
function; from then on arguments are handed out as they come. What turns out to be no call before that (`NotACall`) is
given back, and comes out as the text that it was.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ensemble_server.ensembles.base import ToolCallDelta
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.tool_formats.values import StringRepair, arguments_object, typed, types_of

Piece = str | ToolCallDelta
T = TypeVar("T")
Reads = Generator[None, None, T]  # suspended until more text has come

SPACE = " \t\r\n"
_NAME = re.compile(r"[A-Za-z0-9_.:-]*")
_MAX_NAME_CHARS = 128
_IN_JSON = re.compile(r"[\w\s{}\[\]\",:.+-]")  # what may stand between the strings of JSON


_CALL_KEYS = frozenset({"name", "function", "arguments", "parameters", "type", "id"})


class NotACall(Exception):
    """What was taken for a call is none."""


@dataclass(frozen=True)
class Ending:
    """`text` ends a value if one of `then` comes next, white space apart, or nothing at all: what stands in a value
    looks like its end sometimes. Without `then` it always does. With `is_next` it belongs to what follows."""

    text: str
    then: tuple[str, ...] = ()
    is_next: bool = False


class CallReader(ABC):
    """Reads one choice's text. `functions`: name -> JSON schema of the arguments, of those that may be called; None:
    not known. With `parallel` false calls after the first are dropped."""

    only_known: ClassVar[bool] = False  # whether what names another function is text: formats without a marker

    def __init__(self, functions: Mapping[str, Mapping[str, Any]] | None = None, *, parallel: bool = True) -> None:
        self._functions = functions
        self._parallel = parallel
        self._num_calls = 0
        self._num_arguments = 0  # of the call that is being written argument by argument
        self._is_cut_off = False  # the last of them
        self._text = ""  # what has come and is not settled: it may have to be given back
        self._at = 0  # up to where it has been taken
        self._space_before = ""  # a marker
        self._gap = ""  # white space between what was said and the calls behind it
        self._is_after_call = False  # and nothing was said since
        self._said = ""  # the end of what was said
        self._is_over = False
        self._has_ended = False
        self._out: list[Piece] = []
        self._reading = self._read()

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def feed(self, text: str) -> list[Piece]:
        """What is certain once `text` has come."""
        self._text += text
        return self._advance()

    def close(self) -> list[Piece]:
        """The rest, when no more text comes."""
        self._is_over = True
        return self._advance()

    def _advance(self) -> list[Piece]:
        if not self._has_ended:
            self._has_ended = next(self._reading, self) is self
        out, self._out = self._out, []
        return [piece for piece in out if isinstance(piece, str) or not piece.index or self._parallel]

    @abstractmethod
    def _read(self) -> Reads[None]:
        """All of the answer."""

    # --- what comes out ---------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if text:
            self._out.append(text)
            self._said = (self._said + text)[-16:]

    def _begin(self, name: str) -> None:
        """A call of `name`. Raises `NotACall` if that is no function."""
        is_known = self._functions is None or name in self._functions or not self.only_known
        if not is_known or not 0 < len(name) <= _MAX_NAME_CHARS or _NAME.fullmatch(name) is None:
            raise NotACall
        self._settle()
        self._num_calls += 1
        self._num_arguments = 0
        self._out.append(ToolCallDelta(self._num_calls - 1, name, ""))

    def _argue(self, text: str) -> None:
        """The next piece of the call's arguments."""
        *before, last = self._out or [""]
        if isinstance(last, ToolCallDelta) and last.index == self._num_calls - 1:
            self._out = [*before, ToolCallDelta(last.index, last.name, last.arguments + text)]
        elif text:
            self._out.append(ToolCallDelta(self._num_calls - 1, None, text))

    def _call(self, name: str, arguments: str) -> None:
        self._begin(name)
        self._argue(arguments)

    def _settle(self) -> None:
        """What was taken will not be given back."""
        self._text, self._at = self._text[self._at :], 0

    # --- arguments one by one ---------------------------------------------------------------------------------------

    def _argument(self, key: str) -> None:
        self._argue(f"{', ' if self._num_arguments else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        self._num_arguments += 1

    def _end_arguments(self) -> None:
        if not self._is_cut_off:
            self._argue("}" if self._num_arguments else "{}")
        self._settle()

    def _text_value(self, *endings: Ending) -> Reads[None]:
        """Text up to one of `endings` as a JSON string, handed out as it comes. Cut off, it stays open."""
        self._settle()
        self._argue('"')
        while True:
            place, end = self._ending(endings)
            self._argue(json.dumps(self._text[:place], ensure_ascii=False)[1:-1])
            self._text = self._text[place + _taken(end) :]
            if end is not None:
                self._argue('"')
                return
            if self._is_over:
                self._is_cut_off = True
                return
            yield

    def _schema_of(self, function: str, key: str) -> Any:
        return self._keys_of(function).get(key)

    def _keys_of(self, function: str) -> Mapping[str, Any]:
        """The arguments that a function is said to have, and their schemas."""
        properties = (self._functions or {}).get(function, {}).get("properties")
        return properties if isinstance(properties, dict) else {}

    def _written_value(self, function: str, key: str, *endings: Ending) -> Reads[None]:
        """A value that is written without quotes, up to one of `endings`: what the schema says it is."""
        schema = self._schema_of(function, key)
        if types_of(schema) == {"string"}:
            yield from self._text_value(*endings)
            return
        self._settle()
        while True:
            place, end = self._ending(endings)
            if end is not None or self._is_over:
                break
            yield
        text = self._text[:place]
        self._argue(json.dumps(typed(text, schema), ensure_ascii=False) if end is not None else text.strip())
        self._is_cut_off = end is None
        self._text = self._text[place + _taken(end) :]

    def _ending(self, endings: Sequence[Ending]) -> tuple[int, Ending | None]:
        """Where the first of `endings` stands, and which it is; None while there is none: where it may begin."""
        ends = {ending.text: ending for ending in endings}
        start = 0
        while True:
            place, text = _first(self._text, list(ends), start)
            if not text:
                return len(self._text) - (0 if self._is_over else _begun(self._text, list(ends))), None
            rest = self._text[place + len(text) :].lstrip(SPACE)
            then = ends[text].then
            if not then or rest.startswith(then) or (self._is_over and not rest):
                return place, ends[text]
            if not self._is_over and any(one.startswith(rest) for one in then):
                return place, None
            start = place + 1

    # --- what is taken ----------------------------------------------------------------------------------------------

    def _peek(self) -> Reads[str]:
        """The next character; "" at the end."""
        while self._at >= len(self._text):
            if self._is_over:
                return ""
            yield
        return self._text[self._at]

    def _skip(self, characters: str = SPACE) -> Reads[None]:
        while (char := (yield from self._peek())) and char in characters:
            self._at += 1

    def _accept(self, *options: str) -> Reads[str]:
        """The one of `options` that comes next, of which none begins another; "" if none does."""
        while True:
            for option in options:
                if self._text.startswith(option, self._at):
                    self._at += len(option)
                    return option
            rest = self._text[self._at :]
            if self._is_over or not any(option.startswith(rest) for option in options):
                return ""
            yield

    def _expect(self, *options: str) -> Reads[str]:
        found = yield from self._accept(*options)
        if not found:
            raise NotACall
        return found

    def _until(self, *ends: str) -> Reads[tuple[str, str]]:
        """The text before the first of `ends`, and which one that is; all there is and "" where none comes."""
        start, longest = self._at, max(map(len, ends))
        while True:
            place, end = _first(self._text, ends, start)
            if end or self._is_over:
                before = self._text[self._at : place]
                self._at = place + len(end)
                return before, end
            start = max(self._at, len(self._text) - longest + 1)
            yield

    def _name(self) -> Reads[str]:
        """A function's name, as far as it goes."""
        while True:
            match = _NAME.match(self._text, self._at)
            assert match is not None, "the pattern matches anywhere"
            if match.end() < len(self._text) or self._is_over or len(match.group()) > _MAX_NAME_CHARS:
                if not match.group():
                    raise NotACall
                self._at = match.end()
                return match.group()
            yield

    def _talk(self, *markers: str) -> Reads[str]:
        """Say what comes up to one of `markers`, which is taken and returned; "" at the end. White space before a
        marker is kept in `_space_before`; behind a call it is dropped."""
        self._settle()
        while True:
            end, marker = _first(self._text, markers)
            before = self._text[:end]
            begin = len(before) - len(before.lstrip()) if self._is_after_call else 0
            gap = (before[:begin] or self._gap) if self._is_after_call and self._said else ""
            if marker:
                shown = len(before.rstrip())
            elif self._is_over or not markers:
                shown = end
            else:
                begun = _begun(before, markers)
                shown = len(before[: end - begun].rstrip())
            if shown > begin:
                self._say(gap + before[begin:shown])
                self._is_after_call = False
            if marker or self._is_over:
                self._space_before = before[max(begin, shown) :]
                self._text = self._text[end + len(marker) :]
                return marker
            self._text = self._text[shown if shown > begin else 0 :]
            yield

    # --- JSON -------------------------------------------------------------------------------------------------------

    def _json_string(self) -> Reads[str]:
        text = yield from self._json_value()
        try:
            value = loads(text)
        except ValueError:
            raise NotACall from None
        if not isinstance(value, str):
            raise NotACall
        return value

    def _json_value(self, *, is_arguments: bool = False) -> Reads[str]:
        """The next value as it is written: what stands between brackets or quotes that fit. With `is_arguments` it is
        handed out as it comes, its strings mended, and cut off it stays open."""
        repair = StringRepair()
        if is_arguments:
            self._settle()
        text, depth, is_string, is_escaped = "", 0, False, False
        while True:
            begin, is_complete = self._at, False
            while self._at < len(self._text) and not is_complete:
                char = self._text[self._at]
                if is_string:
                    is_string = char != '"' or is_escaped
                    is_escaped = char == "\\" and not is_escaped
                    is_complete = not is_string and not depth
                elif char == '"':
                    is_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]" and depth:
                    depth -= 1
                    is_complete = not depth
                elif not depth and char in "}],;" + SPACE:
                    is_complete = True
                    break
                elif not _IN_JSON.match(char):
                    break
                self._at += 1
            piece = self._text[begin : self._at]
            is_broken = not is_complete and (self._at < len(self._text) or self._is_over)  # or broken off
            if is_arguments:
                self._argue(repair.feed(piece, is_last=is_complete or is_broken))
                self._settle()
            else:
                text += piece
            if is_complete:
                return text
            if is_broken:
                if is_arguments:
                    return text
                raise NotACall
            yield

    def _json_call(self, *, is_open: bool = False, needs_arguments: bool = False) -> Reads[None]:
        """{"name": ..., "arguments": {...}} in any order, with other names for them, and inside {"function": {...}}.
        `is_open`: the first bracket has been taken."""
        if not is_open:
            yield from self._expect("{")
        name, arguments, has_called = None, None, False
        while True:
            yield from self._skip()
            if (yield from self._accept("}")):
                break
            key = yield from self._json_string()
            if self.only_known and key not in _CALL_KEYS:
                raise NotACall
            yield from self._skip()
            yield from self._expect(":")
            yield from self._skip()
            first = yield from self._peek()
            if key in ("name", "function") and first == '"':
                name = yield from self._json_string()
            elif key in ("arguments", "parameters") and first == "{" and name is not None and not has_called:
                self._begin(name)
                yield from self._json_value(is_arguments=True)
                has_called = True
            elif key == "function" and first == "{" and not has_called:
                yield from self._json_call(needs_arguments=needs_arguments)
                has_called = True
            else:
                value = yield from self._json_value()
                arguments = value if key in ("arguments", "parameters") else arguments
            yield from self._skip()
            if not (yield from self._accept(",")):
                if (yield from self._accept("}")):
                    break
                if has_called:  # models forget the last bracket
                    return
                raise NotACall
        if not has_called:
            if name is None or (needs_arguments and arguments is None):
                raise NotACall
            if (checked := arguments_object(arguments or "{}")) is None:
                raise NotACall
            self._call(name, checked)
        self._settle()

    def _json_calls(self, opened: str = "", *, needs_arguments: bool = False) -> Reads[None]:
        """One call or several: in an array, or one behind the other. `opened`: the bracket that has been taken."""
        is_array = opened == "[" or (not opened and bool((yield from self._accept("["))))
        has_any = False
        while True:
            if opened != "{" or has_any:
                yield from self._skip(SPACE + ",;")
            if not has_any or (yield from self._peek()) == "{":
                is_open = opened == "{" and not has_any
                yield from self._json_call(is_open=is_open, needs_arguments=needs_arguments)
                has_any = True
                continue
            if is_array and (yield from self._accept("]")):
                self._settle()
            self._at = 0
            return


class MarkedReader(CallReader):
    """Calls stand behind markers. White space around them is dropped."""

    opens: ClassVar[tuple[str, ...]]

    def _read(self) -> Reads[None]:
        while marker := (yield from self._talk(*self.opens)):
            num_before = self._num_calls
            with suppress(NotACall):
                yield from self._section(marker)
            self._at = 0
            if self._num_calls == num_before:
                gap = self._gap if self._is_after_call else ""
                self._say(gap + self._space_before + marker)
                self._is_after_call = False
            else:
                if not self._is_after_call:
                    self._gap = self._space_before if self._said else ""
                self._is_after_call = True

    @abstractmethod
    def _section(self, marker: str) -> Reads[None]:
        """What follows `marker`, up to the end of its calls. What it takes and does not settle is text."""

    def _fenced_calls(self, *ends: str) -> Reads[None]:
        """Calls in JSON up to one of `ends`, also in a block of code, or with a bracket too many."""
        yield from self._skip()
        if (yield from self._accept("```")):
            yield from self._accept("json")
        yield from self._skip()
        yield from self._json_calls()
        yield from self._skip(SPACE + "`}")
        yield from self._close(*ends)

    def _close(self, *ends: str) -> Reads[None]:
        """The end of a section, which models leave out at the end of their answer."""
        yield from self._skip()
        if (yield from self._accept(*ends)):
            self._settle()
        self._at = 0


def _taken(end: Ending | None) -> int:
    return 0 if end is None or end.is_next else len(end.text)


def _first(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Where the first of `markers` stands in `text`, and which it is; (len(text), "") if none does."""
    found = [(place, marker) for marker in markers if (place := text.find(marker, start)) >= 0]
    return min(found, default=(len(text), ""))


def _begun(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `markers`: ("a <to", ["<tool"]) -> 3"""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(len(mark) > n and mark.startswith(text[-n:]) for mark in markers)), 0
    )
