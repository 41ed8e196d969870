"""What an engine does about a request's tools: what it is asked instead, and calls read out of what it writes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ensemble_server.ensembles.base import Delta, Event, GenerationRequest, NamedFunction, ToolCallDelta
from ensemble_server.server.tool_formats.formats import FORMATS
from ensemble_server.server.tool_formats.json_calls import BareReader, NamedReader
from ensemble_server.server.tool_formats.reader import CallReader
from ensemble_server.server.weights.view import Surface

NewReader = Callable[[], CallReader]


@dataclass(frozen=True)
class ToolUse:
    """`request`: as the engine gets it. `new_reader`: makes one for each choice; None: what is written stays text."""

    request: GenerationRequest
    new_reader: NewReader | None = None

    @classmethod
    def of(cls, request: GenerationRequest, surface: Surface | None) -> ToolUse:
        """For a model that reads and writes by `surface` (None: it has its calls apart). A forced call is read as the
        grammar writes it, a free one as the model's own format has it; without a known one it stays text.
        """
        if not request.tools or surface is None:
            return cls(request)
        match request.tool_choice:
            case NamedFunction(name):
                return cls(request, lambda: NamedReader(name))
            case "required":
                return cls(request, lambda: BareReader(functions_of(request)))
        if surface.tool_format is None:
            return cls(request)
        reader = FORMATS[surface.tool_format].reader
        functions, parallel = functions_of(request), request.parallel_tool_calls
        # subtle: the markers of many formats are special tokens, which would be left out of the text
        shown = replace(request, sampling=replace(request.sampling, skip_special_tokens=False))
        return cls(shown, lambda: reader(functions, parallel=parallel))

    def read(self, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        """`events` with the calls in their texts as calls. Closing it closes them."""
        return events if self.new_reader is None else _with_calls(events, self.new_reader)


async def _with_calls(events: AsyncGenerator[Event], new_reader: NewReader) -> AsyncGenerator[Event]:
    readers: dict[int, CallReader] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                if event.index not in readers:
                    readers[event.index] = new_reader()
                yield _read(event, readers[event.index])
            else:
                yield event


def functions_of(request: GenerationRequest) -> dict[str, Mapping[str, Any]]:
    """name -> JSON schema of the arguments"""
    functions = [tool["function"] for tool in request.tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def _read(delta: Delta, reader: CallReader) -> Delta:
    pieces = reader.feed(delta.text)
    if delta.finish_reason is not None:
        pieces += reader.close()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return replace(delta, text=text, calls=tuple(piece for piece in pieces if isinstance(piece, ToolCallDelta)))
