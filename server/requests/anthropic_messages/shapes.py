"""The shapes of messages, for type checkers and for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from ensemble_server.server.requests.responses import EnsembleObject, TokenLogprobObject

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlockObject(TypedDict):
    """`logprobs` is there if `explain` was asked for."""

    type: Literal["text"]
    text: str
    logprobs: NotRequired[list[TokenLogprobObject]]


class ThinkingBlockObject(TypedDict):
    """`signature`: a digest of the thought, empty until it has ended."""

    type: Literal["thinking"]
    thinking: str
    signature: str
    logprobs: NotRequired[list[TokenLogprobObject]]


class ToolUseBlockObject(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    logprobs: NotRequired[list[TokenLogprobObject]]


BlockObject = TextBlockObject | ThinkingBlockObject | ToolUseBlockObject


class OutputTokensDetails(TypedDict):
    thinking_tokens: int


class MessageUsageObject(TypedDict):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageObject(TypedDict):
    """`ensemble` is there once the message has ended, `stop_reason` is null before."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockObject]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsageObject
    ensemble: NotRequired[EnsembleObject]


class TokenCount(TypedDict):
    input_tokens: int
