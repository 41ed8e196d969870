"""The shapes of all answers, for type checkers and for OpenAPI.

Typed dictionaries and not pydantic models: an answer is built once, by this server, and goes straight to orjson;
validating every token's chunk would cost more than all else that HTTP does with it. The tests validate them, against
these and against the `openai` package's own types.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import (
    TypedDict,  # pydantic, which describes these for OpenAPI, takes no other before Python 3.12
)


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class UsageObject(TypedDict):
    """`completion_tokens_details` is there if some of the completion's tokens are thoughts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class MemberUsageObject(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: NotRequired[int]
    cost: NotRequired[float]


class EnsembleObject(TypedDict):
    """Who answered. `turnout`: how many of `members` did. `trace` is there if `explain` was asked for.

    `vocabulary`: what the members' distributions were averaged over, `tokens` or `bytes`, where they were. `gate` is
    there if a learned one moved the weights.
    """

    method: str
    members: list[str]
    turnout: int
    usage: dict[str, MemberUsageObject]
    vocabulary: NotRequired[Literal["tokens", "bytes"]]
    gate: NotRequired[Literal[True]]
    trace: NotRequired[Any]


class AlternativeObject(TypedDict):
    """`token_id` is there if `explain` was asked for."""

    token: str
    logprob: float
    bytes: list[int]
    token_id: NotRequired[int]


class MemberTokenObject(TypedDict):
    """`top`: the member's own most likely tokens, if `explain: {"top": N}` was asked for."""

    logprob: float
    weight: float
    top: NotRequired[list[AlternativeObject]]


class TokenLogprobObject(AlternativeObject):
    """`members`, `entropy` (nats) and `disagreement` (Jensen-Shannon, nats) are there if `explain` was asked for."""

    top_logprobs: list[AlternativeObject]
    members: NotRequired[dict[str, MemberTokenObject]]
    entropy: NotRequired[float]
    disagreement: NotRequired[float]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprobObject]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Parallel lists. The first token of an echoed prompt has null: nothing predicts it. `content` is explain's."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    content: NotRequired[list[TokenLogprobObject]]


class PromptLogprob(TypedDict):
    """vLLM's. `rank` counts from 1 and is null below the alternatives that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


class FunctionCallObject(TypedDict):
    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCallObject


class AssistantMessageObject(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallObject]]


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessageObject
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageObject
    ensemble: EnsembleObject
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageObject
    ensemble: EnsembleObject


class ModelEnsemble(TypedDict):
    """What the config says: a weight per member and, where the method has them, how they are pooled. `overrides`: the
    keys of a request's `ensemble` object that the method honours, besides `explain`. `gate` is there if there is a
    learned one; requests with weights, a pool or a share of their own are answered without it."""

    method: str
    members: list[str]
    weights: dict[str, float]
    pool: NotRequired[str]
    share: NotRequired[float]
    when: NotRequired[dict[str, float]]
    gate: NotRequired[Literal[True]]
    overrides: list[str]


class ModelObject(TypedDict):
    """`ensemble` is there for models made of others. `max_model_len`: tokens; null if only the remote end knows.
    `explains_tokens`: whether a request with `explain` gets a view of every token. The embedding model, which
    /v1/embeddings asks, is listed last; it does not chat."""

    id: str
    kind: Literal["hosted", "remote", "ensemble", "embedding"]
    explains_tokens: bool
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    ensemble: NotRequired[ModelEnsemble]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class EmbeddingObject(TypedDict):
    """`embedding` is a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class ClassificationObject(TypedDict):
    """`label` is the likeliest. `members`: of an ensemble of texts, what each of its members gives."""

    object: Literal["classification"]
    model: str
    label: str
    probabilities: dict[str, float]
    members: dict[str, dict[str, float]]
    usage: UsageObject


class Tokens(TypedDict):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class ModelTokens(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class KeyUsage(TypedDict):
    """What a key has used since `since` (Unix time), rows of batches counted as requests; `refused`: how often a limit
    turned it away. `limits`: those that are set, as the config has them; `remaining`: what is left of them in this
    minute."""

    object: Literal["usage"]
    key: str
    since: int
    requests: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    upload_bytes: int
    streams: int
    models: dict[str, ModelTokens]
    limits: dict[str, int | list[str]]
    remaining: dict[str, int]


class Health(TypedDict):
    """`down`: listed models that cannot answer now; `impaired`: ensembles of which some part cannot."""

    status: Literal["ok", "degraded"]
    down: NotRequired[list[str]]
    impaired: NotRequired[list[str]]


class Version(TypedDict):
    version: str
