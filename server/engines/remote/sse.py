"""Server-sent events, the reading half: bytes as they come from the network, in; the data of each whole event, out.

Follows the WHATWG's event stream format. Leaves out event names, ids and retry times, which OpenAI-compatible streams
do not use. httpx's own `aiter_lines` is no help: it also ends lines at U+2028 and its kin, which JSON strings may hold.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 16 * 1024 * 1024  # an event without end must not fill the memory

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventDecoder:
    """Give it chunks cut anywhere; it returns the events that each of them completes.

    feed(b"data: 1\\n\\nda") -> ["1"];  feed(b"ta: 2\\n\\n") -> ["2"]

    An event that the stream breaks off is never returned, as the format wants it. Raises `ValueError` for data that is
    no UTF-8 and for an event above `MAX_EVENT_BYTES`.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # the line that has not ended yet; joined once, or long lines cost their square
        self._held = b""  # a "\r" at the end of a chunk: its "\n" may be the first byte of the next one
        self._data: list[bytes] = []  # data lines of the event that has not ended yet
        self._num_rest_bytes = 0
        self._num_bytes = 0
        self._is_first_line = True

    def feed(self, chunk: bytes) -> list[str]:
        events: list[str] = []
        buffer = self._held + chunk
        self._held = b"\r" if buffer.endswith(b"\r") else b""
        buffer = buffer.removesuffix(b"\r")
        start = 0
        for end in _LINE_END.finditer(buffer):
            self._line(b"".join((*self._rest, buffer[start : end.start()])), events)
            self._rest.clear()
            start = end.end()
        self._rest.append(buffer[start:])
        self._num_rest_bytes = (self._num_rest_bytes if start == 0 else 0) + len(buffer) - start
        if self._num_rest_bytes + self._num_bytes > MAX_EVENT_BYTES:
            raise ValueError(f"one event is longer than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes, events: list[str]) -> None:
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode())
            self._data, self._num_bytes = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._num_bytes += len(value)
