"""What clients may ask for with POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag
from pydantic_core import PydanticCustomError

from ensemble_server.server.requests.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, WHOLE, Part
from ensemble_server.server.requests.protocol import Controls, Count, ThoughtTokens

# --- items of the input -------------------------------------------------------------------------------------------

_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


def _readable(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _TEXTS | {"refusal"}:
        raise PydanticCustomError(
            "unsupported_parameter", "{kind} parts cannot be read: the models here read text only", {"kind": kind[:40]}
        )
    return value


class TextPart(Part):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(lambda value: "refusal" if _type_of(value) == "refusal" else "text"),
    BeforeValidator(_readable),
]
Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class MessageItem(Part):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="a JSON object as text")


class CallOutputItem(Part):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(Part):
    """Thoughts of an earlier answer. Models do not read them again."""

    type: Literal["reasoning"]


class ItemReference(Part):
    """An item of a response that was stored."""

    type: Literal["item_reference"] | None = None
    id: str


class OtherItem(Part):
    """What tools of OpenAI's own left behind. Skipped."""

    type: str


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _item_kind(value: Any) -> str:
    kind = _type_of(value)
    if kind is None:
        return "message" if isinstance(value, MessageItem) or "role" in value else "item_reference"
    return kind if isinstance(kind, str) and kind in _ITEM_KINDS else "other"


_ITEM_KINDS = frozenset({"message", "function_call", "function_call_output", "reasoning", "item_reference"})
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(lambda value: _item_kind(value) if isinstance(value, dict | Part) else "other"),
]
Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("items")],
    Discriminator(lambda value: "items" if isinstance(value, list) else "text"),
]

# --- tools --------------------------------------------------------------------------------------------------------


class FunctionTool(Part):
    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(default=None, description="JSON schema of the arguments")
    strict: bool | None = None


class OtherTool(Part):
    """One that OpenAI would run. Skipped."""

    type: str


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
    Discriminator(lambda value: "function" if _type_of(value) == "function" else "other"),
]


class NamedFunction(Part):
    type: Literal["function"]
    name: str


class AllowedTools(Part):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_TOOLS, fail_fast=True)]


class OtherChoice(Part):
    """Of a tool that OpenAI would run. As good as `auto`."""

    type: str


def _choice_kind(value: Any) -> str:
    if isinstance(value, str):
        return "mode"
    kind = _type_of(value)
    return kind if kind in ("function", "allowed_tools") else "other"


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed_tools")]
    | Annotated[OtherChoice, Tag("other")],
    Discriminator(_choice_kind),
]

# --- the body -----------------------------------------------------------------------------------------------------


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema", description="needed with json_schema")
    strict: bool | None = None


class TextSettings(Part):
    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, description="ignored: the models here have no levels of it")


class ReasoningSettings(Part):
    effort: str | None = Field(
        default=None, description='told to chat templates that know levels, or a switch; "none" turns thoughts off'
    )
    summary: str | None = Field(
        default=None, description="any value: thoughts come as the item's summary, in full, and not as its content"
    )


class ResponsesBody(Controls):
    """POST /v1/responses"""

    input: Input
    instructions: str | None = Field(default=None, description="a system message before the input, for this time only")
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None
    store: bool | None = Field(default=None, description="false: the response is forgotten at once")
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = Field(
        default=None, description="`message.output_text.logprobs`; others are not here, and ignored"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: of a prompt that is too long, its end is read"
    )
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    max_reasoning_tokens: ThoughtTokens | None = None
    stream_options: dict[str, JsonValue] | None = None
    max_tool_calls: Annotated[int, WHOLE] | None = Field(
        default=None, description="of OpenAI's own tools; there are none"
    )
    background: bool | None = None
    conversation: JsonValue = None
    prompt: JsonValue = None
