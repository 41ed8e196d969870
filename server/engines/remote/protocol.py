"""OpenAI's chat and completion API as its client sees it: the body of a request, and what streams back.

Lenient in what it reads: unknown fields are ignored, and what servers vary in (reasoning fields, finish reasons, the
form of errors) is understood in every variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from ensemble_server.ensembles.base import (
    FinishReason,
    GenerationRequest,
    Grammar,
    MemberToken,
    NamedFunction,
    Sampling,
    TokenLogprob,
)
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.ensembles.surrogates import with_stand_ins, without_stand_ins

Kind = TypeVar("Kind", bound=BaseModel)

MAX_TOKENS = 10**9  # that one answer may say it used
UNKNOWN_TOKEN_ID = -1  # OpenAI's logprobs name tokens by their text only

FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
}
FAILED_REASONS = ("content_filter", "abort", "error")  # the text before these is no answer

# Fields of `Sampling` that travel under their own name, and only if they are set: OpenAI itself refuses some of them.
_SAMPLING_FIELDS = (
    "max_tokens",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)


# --- the request --------------------------------------------------------------------------------------------------


def request_body(
    name: str, model: str, request: GenerationRequest, *, takes_ensemble: bool = False
) -> tuple[str, dict[str, Any]]:
    """The path below the base URL, and the JSON body, of `request` to the remote `model` that is called `name` here.

    `takes_ensemble`: the remote end is a server of this kind, which knows the `"ensemble"` object. Raises
    `UnsupportedError` for what no other OpenAI-compatible API takes.
    """
    _check_supported(name, replace(request, overrides={}) if takes_ensemble else request)
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if takes_ensemble and (request.overrides or request.explain):
        body["ensemble"] = dict(request.overrides) | ({"explain": True} if request.explain else {})
    if request.messages is not None:
        path = "chat/completions"
        body["messages"] = [dict(message) for message in request.messages]
        if request.template_kwargs:
            body["chat_template_kwargs"] = dict(request.template_kwargs)
        if request.thinks is False:
            body["reasoning_effort"] = "none"
        elif request.reasoning_effort is not None:
            body["reasoning_effort"] = request.reasoning_effort
        if request.max_reasoning_tokens is not None:
            body["thinking_token_budget"] = request.max_reasoning_tokens  # vLLM's name; OpenAI has none
        if request.tools:
            body |= _tools_body(request)
        if request.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    else:
        assert request.prompt is not None, "a request has messages or a prompt"
        path = "completions"
        body["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        if request.top_logprobs is not None:
            body["logprobs"] = request.top_logprobs
    if request.n > 1:
        body["n"] = request.n
    if request.truncate_prompt_tokens is not None:
        body["truncate_prompt_tokens"] = request.truncate_prompt_tokens
    sampling = request.sampling
    if request.tools and request.tool_choice != "auto":  # the remote end forces the call in its own way
        sampling = replace(sampling, grammar=None)
    return path, body | _sampling_body(sampling)


def _tools_body(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"tools": [dict(tool) for tool in request.tools]}
    match request.tool_choice:
        case NamedFunction(name):
            body["tool_choice"] = {"type": "function", "function": {"name": name}}
        case "required":
            body["tool_choice"] = "required"
    return body if request.parallel_tool_calls else body | {"parallel_tool_calls": False}


def _check_supported(name: str, request: GenerationRequest) -> None:
    grammar = request.sampling.grammar
    refused = {
        "prompt_logprobs": request.prompt_logprobs is not None,
        "a regular expression": grammar is not None and grammar.kind == "regex",
        **{f"ensemble.{key}": True for key in request.overrides},
    }
    for what, is_asked in refused.items():
        if is_asked:
            param = "structured_outputs" if what == "a regular expression" else what
            raise UnsupportedError(
                f"model {name!r} answers through a remote API, which takes no {what}; ask a hosted model", param=param
            )


def _sampling_body(sampling: Sampling) -> dict[str, Any]:
    default = Sampling()
    body: dict[str, Any] = {"temperature": sampling.temperature}
    for key in _SAMPLING_FIELDS:
        if getattr(sampling, key) != getattr(default, key):
            body[key] = getattr(sampling, key)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.grammar is not None:
        body["response_format"] = _response_format(sampling.grammar)
    return body


def _response_format(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_object":
        return {"type": "json_object"}
    schema = {"name": "answer", "schema": orjson.loads(grammar.source), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


# --- the answer ---------------------------------------------------------------------------------------------------


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None

    def read(self, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = without_stand_ins(self.token)
        raw = text.encode() if self.bytes is None else bytes(self.bytes)
        return TokenLogprob(UNKNOWN_TOKEN_ID, text, raw, self.logprob, top)


class MemberView(BaseModel):
    logprob: float
    weight: float


def _views(members: Any) -> Any:
    """Each member's view of a token; None for a field of that name which means something else."""
    is_ours = isinstance(members, dict) and all(
        isinstance(view, dict) and all(isinstance(view.get(key), int | float) for key in ("logprob", "weight"))
        for view in members.values()
    )
    return members if is_ours else None


class ChatToken(Alternative):
    """`members` come from a server of this kind where `explain` was asked for."""

    top_logprobs: list[Alternative] = Field(default_factory=list)
    members: Annotated[dict[str, MemberView] | None, BeforeValidator(_views)] = None

    def read_all(self) -> TokenLogprob:
        read = self.read(tuple(other.read() for other in self.top_logprobs))
        if self.members is None:
            return read
        return replace(read, members={name: MemberToken(v.logprob, v.weight) for name, v in self.members.items()})


class Logprobs(BaseModel):
    """Both forms: `content` is that of chats, the parallel lists are those of completions."""

    content: list[ChatToken] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None

    def read(self) -> tuple[TokenLogprob, ...]:
        """Raises `ValueError` if the parallel lists differ in length."""
        if self.content is not None:
            return tuple(token.read_all() for token in self.content)
        tokens = self.tokens or []
        logprobs = self.token_logprobs or [None] * len(tokens)
        tops = self.top_logprobs or [None] * len(tokens)
        return tuple(
            TokenLogprob(UNKNOWN_TOKEN_ID, token, token.encode(), logprob, _ranked(top or {}))
            for token, logprob, top in zip(map(without_stand_ins, tokens), logprobs, tops, strict=True)
        )


def _ranked(top: dict[str, float]) -> tuple[TokenLogprob, ...]:
    ranked = sorted(((without_stand_ins(token), logprob) for token, logprob in top.items()), key=lambda item: -item[1])
    return tuple(TokenLogprob(UNKNOWN_TOKEN_ID, token, token.encode(), logprob) for token, logprob in ranked)


class CalledFunction(BaseModel):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """Of the arguments. Some servers send them as an object."""
        return orjson.dumps(self.arguments).decode() if isinstance(self.arguments, dict) else self.arguments or ""


class CallPiece(BaseModel):
    """A whole call, or the next piece of call `index`, of which only the first has `id` and a name."""

    index: int | None = Field(default=None, ge=0)
    id: str | None = None
    function: Annotated[CalledFunction, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=CalledFunction
    )


def _texts(parts: Any) -> str:
    """ "a" -> "a"; [{"type": "text", "text": "a"}, "b"] -> "ab"; what is no text is left out."""
    if isinstance(parts, list):
        return "".join(_texts(part.get("text") if isinstance(part, dict) else part) for part in parts)
    return parts if isinstance(parts, str) else ""


class Said(BaseModel):
    """Mistral's reasoning models send `content` as a list of parts, thoughts among them."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPiece] | None = None

    @model_validator(mode="before")
    @classmethod
    def _join_parts(cls, said: Any) -> Any:
        parts = said.get("content") if isinstance(said, dict) else None
        if not isinstance(parts, list):
            return said
        thoughts = "".join(_texts(part["thinking"]) for part in parts if isinstance(part, dict) and "thinking" in part)
        return {"reasoning_content": thoughts or None, **said, "content": _texts(parts)}


class ChunkChoice(BaseModel):
    """One choice: of a chat (`delta` if streamed, else `message`) or of a completion (`text`)."""

    index: Annotated[int, BeforeValidator(lambda value: 0 if value is None else value)] = Field(default=0, ge=0)
    delta: Said | None = None
    message: Said | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: Annotated[str | None, BeforeValidator(lambda value: value or None)] = None  # some send "" until then
    stop_reason: str | int | None = None

    @property
    def said(self) -> Said:
        return self.delta or self.message or Said(content=self.text)


def _believable(number: Any) -> int | None:
    """A count of tokens; None for one that cannot be: an answer is not thrown away for how it was counted."""
    return number if isinstance(number, int) and 0 <= number <= MAX_TOKENS else None


class ChunkUsageDetails(BaseModel):
    reasoning_tokens: Annotated[int | None, BeforeValidator(_believable)] = None


class ChunkUsage(BaseModel):
    prompt_tokens: Annotated[int | None, BeforeValidator(_believable)] = None
    completion_tokens: Annotated[int | None, BeforeValidator(_believable)] = None
    completion_tokens_details: Annotated[
        ChunkUsageDetails | None, BeforeValidator(lambda value: value if isinstance(value, dict) else None)
    ] = None

    @property
    def reasoning_tokens(self) -> int:
        details = self.completion_tokens_details
        return (details and details.reasoning_tokens) or 0


class Chunk(BaseModel):
    """One streamed event, or a whole answer."""

    choices: list[ChunkChoice] | None = None
    usage: Annotated[ChunkUsage | None, BeforeValidator(lambda value: value if isinstance(value, dict) else None)] = (
        None
    )
    ensemble: Any = None
    error: Any = None


# --- scoring a text that is given ---------------------------------------------------------------------------------


def scoring_bodies(model: str, token_ids: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """Bodies of completions that ask for the log-probabilities of `token_ids`, in the order in which they are tried:
    as vLLM has it, and as OpenAI's first API had it."""
    prompt = list(token_ids)
    common = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0}
    return {**common, "prompt_logprobs": 0}, {**common, "echo": True, "logprobs": 1}


class ScoredChoice(BaseModel):
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    logprobs: Logprobs | None = None

    def of_prompt(self, token_ids: Sequence[int]) -> list[float] | None:
        """Nats of every token but the first; None if they are not in the answer, or not those of `token_ids`."""
        if self.prompt_logprobs is not None:
            given = [
                None if entry is None else entry.get(str(token_id))
                for entry, token_id in zip(self.prompt_logprobs, token_ids, strict=False)
            ]
            found = [None if entry is None else entry.get("logprob") for entry in given[1:]]
            is_whole = len(self.prompt_logprobs) == len(token_ids)
        elif self.logprobs is not None and self.logprobs.token_logprobs is not None:
            of_all = self.logprobs.token_logprobs
            found, is_whole = of_all[1 : len(token_ids)], len(token_ids) <= len(of_all) <= len(token_ids) + 1
            is_whole = is_whole and of_all[0] is None  # an end that put a token before the text scores the first, too
        else:
            return None
        numbers = [float(one) for one in found if isinstance(one, int | float)]
        return numbers if is_whole and len(numbers) == len(token_ids) - 1 else None


class Scored(BaseModel):
    """A completion that was asked for the log-probabilities of its prompt."""

    choices: list[ScoredChoice] = Field(min_length=1)
    usage: ChunkUsage | None = None


def read_whole(kind: type[Kind], source: str) -> Kind:
    """`kind` from JSON whose characters may be cut in two, of which `Secrets` make whole ones."""
    return kind.model_validate_json(with_stand_ins(source))


# --- errors -------------------------------------------------------------------------------------------------------


def parse_error_body(body: bytes) -> tuple[str, str | None]:
    """What the body of an error response says, however long, and its code. A body that is no JSON is quoted."""
    try:
        return error_message(orjson.loads(with_stand_ins(body.decode())))
    except ValueError:
        return body.decode(errors="replace").strip(), None


def error_message(said: Any) -> tuple[str, str | None]:
    """The message, however long, and the code of OpenAI's error object, or of one of its variants.

    {"error": {"message": "no", "code": "x"}} -> ("no", "x");  {"detail": "no"} -> ("no", None);  "no" -> ("no", None)
    """
    if isinstance(said, dict) and said.get("error"):
        said = said["error"]
    if not isinstance(said, dict):
        return str(said), None
    code = said.get("code")
    return str(said.get("message") or said.get("detail") or said), code if isinstance(code, str) else None


def is_about_context(message: str, code: str | None) -> bool:
    """Whether a refusal says that prompt and answer do not fit into the model."""
    phrases = ("context length", "context size", "context window")
    return code == "context_length_exceeded" or any(phrase in message.lower() for phrase in phrases)
