"""What clients may ask for with POST /v1/messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag
from pydantic_core import PydanticCustomError

from ensemble_server.server.requests.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, Part
from ensemble_server.server.requests.protocol import Controls, NewTokens, Thinking, ThoughtTokens

# --- content blocks -----------------------------------------------------------------------------------------------


_KINDS = frozenset({"text", "document", "thinking", "redacted_thinking", "tool_use", "tool_result"})


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _kind_of(value: Any) -> str:
    kind = _type_of(value)
    return kind if isinstance(kind, str) and kind in _KINDS else "text"


def _readable(value: Any) -> Any:
    kind = _type_of(value)
    if isinstance(kind, str) and kind not in _KINDS:
        raise PydanticCustomError(
            "unsupported_parameter", "{kind} blocks cannot be read: the models here read text only", {"kind": kind[:40]}
        )
    return value


class TextBlock(Part):
    type: Literal["text"]
    text: str


class TextSource(Part):
    type: Literal["text"]
    data: str


def _text_source(value: Any) -> Any:
    kind = _type_of(value)
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_parameter",
            "a document from {kind} cannot be read: the models here read text only",
            {"kind": kind[:40]},
        )
    return value


class DocumentBlock(Part):
    type: Literal["document"]
    source: Annotated[TextSource, BeforeValidator(_text_source)]
    title: str | None = None
    context: str | None = None


class ThinkingBlock(Part):
    """Thoughts of an earlier answer. Models do not read them again."""

    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[DocumentBlock, Tag("document")],
    Discriminator(lambda value: "document" if _type_of(value) == "document" else "text"),
    BeforeValidator(_readable),
]
ResultContent = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultContent | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(lambda value: "thinking" if (kind := _kind_of(value)) == "redacted_thinking" else kind),
    BeforeValidator(_readable),
]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True), Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]
System = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]


class InputMessage(Part):
    role: Literal["user", "assistant", "system"]
    content: Content


# --- tools --------------------------------------------------------------------------------------------------------


class CustomTool(Part):
    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, JsonValue]


class OtherTool(Part):
    """One that Anthropic would run, or knows by its type alone. Skipped."""

    type: str


MessageTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[OtherTool, Tag("other")],
    Discriminator(lambda value: "custom" if _type_of(value) in (None, "custom") else "other"),
]


class MessageToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="needed with type tool")
    disable_parallel_tool_use: bool | None = None


# --- the bodies ---------------------------------------------------------------------------------------------------


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(Part):
    effort: str | None = Field(default=None, description="told to chat templates that know levels, or a switch")
    format: OutputFormat | None = None


class PromptPart(Part):
    """What the prompt is made of: what /v1/messages answers and /v1/messages/count_tokens counts."""

    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: System | None = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = Field(
        default=None, description="whether to think, where the chat template has a switch, and how long at most"
    )
    max_reasoning_tokens: ThoughtTokens | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(default=None, description="an older place for output_config.format")
    chat_template_kwargs: dict[str, JsonValue] | None = None
    cache_control: JsonValue = None
    context_management: JsonValue = None


class CountTokensBody(PromptPart):
    """POST /v1/messages/count_tokens"""

    model: str | None = Field(default=None, description="may be left out where one model is served")


class MessagesBody(Controls, PromptPart):
    """POST /v1/messages"""

    max_tokens: NewTokens | None = Field(default=None, description="as many as fit, if it is left out")
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None
