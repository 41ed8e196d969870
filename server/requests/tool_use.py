"""What a chat asks of tools: which there are, whether one must be called, and whose calls could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ensemble_server.ensembles.base import Grammar, NamedFunction
from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.requests.call_grammars import named_call_grammar, required_call_grammar
from ensemble_server.server.requests.messages import FunctionDefinition, NamedTool, Tool
from ensemble_server.server.requests.models import speakers_of
from ensemble_server.server.requests.protocol import ChatBody
from ensemble_server.server.requests.structured_output import check_grammar

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting


@dataclass(frozen=True)
class AskedTools:
    """`definitions`, `choice`, `parallel`: as in `GenerationRequest`. `grammar`: of a call that is forced. `unread`:
    models of which no format of calls is known, where calls are free: they answer in text."""

    definitions: tuple[dict[str, Any], ...]
    choice: Literal["auto", "required"] | NamedFunction = "auto"
    parallel: bool = True
    grammar: Grammar | None = None
    unread: tuple[str, ...] = ()


def asked_tools(body: ChatBody, hosting: Hosting, model_name: str) -> AskedTools | None:
    """None if no call can come. Raises `RequestError`.

    Forced calls (required or named) need no template that knows tools: the grammar alone makes them calls.
    """
    choice = body.tool_choice or "auto"
    if not body.tools:
        if choice not in ("none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    definitions = tuple(tool_definition(tool.function) for tool in body.tools)
    if choice == "auto":
        return AskedTools(
            definitions, parallel=body.parallel_tool_calls is not False, unread=_unread(hosting, model_name)
        )
    if body.response_format is not None or body.structured_outputs is not None:
        raise RequestError("a forced tool call leaves no room for another output format", param="tool_choice")
    if isinstance(choice, NamedTool):
        function = _named(choice.function.name, body.tools).function
        grammar = named_call_grammar(function.parameters)
        check_grammar(grammar, param="tools")
        return AskedTools(definitions, NamedFunction(function.name), grammar=grammar)
    grammar = required_call_grammar([(tool.function.name, tool.function.parameters) for tool in body.tools])
    check_grammar(grammar, param="tools")
    return AskedTools(definitions, "required", grammar=grammar)


def _unread(hosting: Hosting, model_name: str) -> tuple[str, ...]:
    speakers = speakers_of(hosting, model_name)
    return tuple(name for name, surface in speakers.items() if surface is not None and surface.tool_format is None)


def _named(name: str, tools: Sequence[Tool]) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise RequestError(f"tool_choice names {name[:64]!r}, which is not in tools", param="tool_choice")


def tool_definition(function: FunctionDefinition) -> dict[str, Any]:
    """A tool as chat templates expect it."""
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }
