"""The shapes of responses, for type checkers and for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from ensemble_server.server.requests.responses import EnsembleObject, TokenLogprobObject

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputTextObject(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprobObject]


class ReasoningTextObject(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class SummaryTextObject(TypedDict):
    type: Literal["summary_text"]
    text: str


class MessageItemObject(TypedDict):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[OutputTextObject]


class ReasoningItemObject(TypedDict):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[SummaryTextObject]
    content: list[ReasoningTextObject]
    logprobs: NotRequired[list[TokenLogprobObject]]


class CallItemObject(TypedDict):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status
    logprobs: NotRequired[list[TokenLogprobObject]]


ItemObject = MessageItemObject | ReasoningItemObject | CallItemObject


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsageObject(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseErrorObject(TypedDict):
    code: str
    message: str


class ReasoningObject(TypedDict):
    effort: str | None
    summary: str | None


class ResponseObject(TypedDict):
    """`ensemble` is there once the response has ended, `usage` is null before."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseErrorObject | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    system_fingerprint: str
    output: list[ItemObject]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningObject
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsageObject | None
    ensemble: NotRequired[EnsembleObject]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]
