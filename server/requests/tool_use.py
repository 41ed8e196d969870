"""How the tools of a chat request are served by the model it goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.messages import FunctionDefinition, NamedTool, Tool
from ensemble_server.server.requests.protocol import ChatBody
from ensemble_server.server.requests.structured_output import check_grammar
from ensemble_server.server.requests.tool_calls import (
    NamedCallParser,
    ToolCallParser,
    WholeAnswerParser,
    named_call_grammar,
    parser_for,
    required_call_grammar,
    tool_format,
)

if TYPE_CHECKING:
    from ensemble_server.server.weights.view import Surface


@dataclass(frozen=True)
class ToolUse:
    """How one request's tools are served: what the template renders, what forces a call, what reads it back."""

    rendered: tuple[dict[str, Any], ...]
    new_parser: Callable[[], ToolCallParser]
    grammar: Grammar | None = None
    keep_special_tokens: bool = False


def tool_use(body: ChatBody, surface: Surface | None, model_name: str) -> ToolUse | None:
    """None if no call can come. Raises `RequestError`, or `UnsupportedError` where the model knows no tools.

    Forced calls (required or named) need no template that knows tools: the grammar alone makes them calls.
    """
    choice = body.tool_choice or "auto"
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    if surface is None:
        raise UnsupportedError(
            f"tools: model {model_name!r} is not hosted here, so its calls cannot be read", param="tools"
        )
    tools = tuple(tool_definition(tool.function) for tool in body.tools)
    rendered = tools if surface.supports_tools else ()
    if choice == "auto":
        form = tool_format(surface.chat_template or "") if surface.supports_tools else None
        if form is None:
            raise UnsupportedError(
                f"tools: the chat template of model {model_name!r} has no tool calls in a known format; "
                "tool_choice required, or a named function, works with any hosted model",
                param="tools",
            )
        parallel = body.parallel_tool_calls is not False
        # subtle: Mistral's marker is a special token, which would be left out of the text
        return ToolUse(rendered, lambda: parser_for(form, parallel=parallel), keep_special_tokens=form == "mistral")
    if body.response_format is not None or body.structured_outputs is not None:
        raise RequestError("a forced tool call leaves no room for another output format", param="tool_choice")
    if isinstance(choice, NamedTool):
        function = _named(choice.function.name, body.tools).function
        grammar = named_call_grammar(function.parameters)
        check_grammar(grammar, param="tools")
        return ToolUse(rendered, lambda: NamedCallParser(function.name), grammar)
    grammar = required_call_grammar([(tool.function.name, tool.function.parameters) for tool in body.tools])
    check_grammar(grammar, param="tools")
    return ToolUse(rendered, WholeAnswerParser, grammar)


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
