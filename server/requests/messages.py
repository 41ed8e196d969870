"""Chat messages and tools as clients send them: checked, and brought into the one form that chat templates read.

Text parts are joined by newlines, as vLLM does; `developer` is the newer name of `system`. Parts that are not text are
refused by name: no model here reads images, audio or files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag
from pydantic_core import PydanticCustomError, from_json

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.errors import RequestError
from ensemble_server.ensembles.surrogates import with_mended_escapes

# What one body may hold. The first wrong item of a list ends its check: the others would only be counted.
MAX_MESSAGES = 16_384
MAX_PARTS = 4096
MAX_CALLS = 1024
MAX_TOOLS = 128


class Part(BaseModel):
    """A piece of a request. Strict: "1" is no number. What it does not know it ignores, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _text_part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_parameter", "{kind} parts cannot be read: the models here read text only", {"kind": kind[:40]}
        )
    return value


def is_integer(value: Any) -> bool:
    """Whether a JSON value is a whole number. 2.0 is one: JSON knows one kind of number. True is none."""
    return type(value) is int or (type(value) is float and value.is_integer())


WHOLE = BeforeValidator(lambda value: int(value) if is_integer(value) else value)  # on every int of a body


class TextPart(Part):
    type: Literal["text"]
    text: str


_TextPart = Annotated[TextPart, BeforeValidator(_text_part)]
Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Annotated[TextPart, BeforeValidator(_text_part)]],
        Field(max_length=MAX_PARTS, fail_fast=True),
        Tag("parts"),
    ],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class SystemMessage(Part):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Part):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Part):
    name: str
    arguments: str | None = Field(default=None, description="a JSON object as text, or its beginning; empty: none")


class MadeToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Part):
    """Nothing at all may have been said: an answer of no tokens comes back as null or an empty text."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MadeToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None


class ToolMessage(Part):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Conversation = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionDefinition(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(default=None, description="JSON schema of the arguments")
    strict: bool | None = Field(default=None, description="the schema is enforced where the call is: required or named")


def _function_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "unsupported_parameter", "tools of type {kind} cannot be served, only functions", {"kind": kind[:40]}
        )
    return value


class Tool(Part):
    type: Literal["function"]
    function: FunctionDefinition


ChatTool = Annotated[Tool, BeforeValidator(_function_tool)]
Tools = Annotated[list[ChatTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedTool, Tag("named")],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "named"),
]


def template_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The conversation in OpenAI's form with plain text contents. Raises `RequestError`."""
    return tuple(_template_message(place, message) for place, message in enumerate(messages))


def _template_message(place: int, message: ChatMessage) -> dict[str, Any]:
    at = f"messages[{place}]"
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message.content)}
    match message:
        case AssistantMessage(tool_calls=[_, *_] as calls):
            plain["tool_calls"] = [_call(f"{at}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
        case ToolMessage():
            plain["tool_call_id"] = message.tool_call_id
    if name := getattr(message, "name", None):
        plain["name"] = name
    return plain


def _text(content: str | list[TextPart] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


def _call(at: str, call: MadeToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": checked_arguments(at, call.function.arguments or "")}
    return {"id": call.id, "type": "function", "function": function}


def checked_arguments(at: str, text: str) -> str:
    """A JSON object. What max_tokens cut off is kept as far as it goes: '{"a": "on' -> '{"a": "on"}'"""
    if not text.strip():
        return "{}"
    text = with_mended_escapes(text)
    try:
        arguments = from_json(text)
    except ValueError as exc:
        try:
            arguments = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            raise RequestError(f"{at}: arguments must be JSON: {exc}", param=f"{at}.function.arguments") from exc
        text = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, dict):
        raise RequestError(f"{at}: arguments must be a JSON object", param=f"{at}.function.arguments")
    return text
