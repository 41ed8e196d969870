"""What clients may ask for: the bodies of all requests, with their ranges.

OpenAI's names, and vLLM's for what OpenAI lacks. A parameter is honoured, or refused by name with the reason
(`REFUSED`), or one that changes nothing here and is accepted (`IGNORED`). Names in none of these are ignored too, but
the client is told (`x-ignored-parameters`), unless `server.strict_params` refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, PlainValidator, Tag, WrapValidator

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.requests.errors import shortened
from ensemble_server.server.requests.messages import WHOLE, Conversation, Part, ToolChoice, Tools, is_integer

logger = logging.getLogger(__name__)

MAX_PROMPTS = 1024
MAX_EMBEDDING_INPUTS = 2048
MAX_INT = 2**31 - 1
MAX_BIASES = 65_536
MAX_STOP_TOKENS = 4096

Count = Annotated[int, Field(ge=1, le=MAX_INT), WHOLE]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT), WHOLE]
NewTokens = Annotated[Literal[-1] | Count, Field(description="-1: as many as fit")]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[str], Field(max_length=64), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]
Prompt = str | tuple[int, ...]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    WrapValidator(lambda value, check: first_checked(value, check, MAX_BIASES)),
]


def first_checked(value: Any, check: Callable[[Any], Any], limit: int) -> Any:
    """What `check` makes of an object with at most `limit` keys; the first wrong one ends it, as in lists."""
    if not isinstance(value, dict):
        return check(value)
    if len(value) > limit:
        raise ValueError(f"may have {limit} keys, got {len(value)}")
    return {name: item for key, sent in value.items() for name, item in check({key: sent}).items()}


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, as texts or token ids, as a list. By hand: a union would try each item thrice."""
    rule = "must be a text, a list of texts, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(rule)
    if not value:
        raise ValueError("must not be empty")
    if all(map(is_integer, value)):
        value = [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"may hold {MAX_PROMPTS} prompts, got {len(value)}")
    return [_prompt(item, rule) for item in value]


def _prompt(item: Any, rule: str) -> Prompt:
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not all(map(is_integer, item)):
        raise ValueError(rule)
    if not item:
        raise ValueError("a list of token ids must not be empty")
    if min(item) < 0 or max(item) > MAX_INT:
        raise ValueError("holds a number that is no token id")
    return tuple(map(int, item))


_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[
    list[Prompt],
    PlainValidator(
        _prompts,
        json_schema_input_type=str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
    ),
]


# --- bodies ------------------------------------------------------------------------------------------------------


class StreamOptions(Part):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="usage so far on every chunk")


class JSONSchemaFormat(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None
    schema_: dict[str, JsonValue] | None = Field(
        default=None, alias="schema", description="another place for json_schema.schema"
    )


class StructuredOutputs(Part):
    """vLLM's way to ask for structured output; exactly one of these."""

    json_: dict[str, JsonValue] | str | None = Field(default=None, alias="json", description="a JSON schema")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None


class Controls(Part):
    """What every way to ask for text shares, under OpenAI's names and vLLM's."""

    model: str | None = Field(default=None, description="may be left out where one model is served")
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), WHOLE] | None = Field(default=None, description="-1 and 0 are off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: LogitBias | None = Field(default=None, description="token id, as text, -> logits that are added")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    stop: Stop | None = Field(default=None, description="an empty text stops nothing")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT), WHOLE] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    ensemble: dict[str, JsonValue] | None = Field(
        default=None, description="`explain`, and what the model's method lets a request change: weights, pool, ..."
    )


ThoughtTokens = Annotated[int, Field(ge=0, le=MAX_INT), WHOLE]


class Thinking(Part):
    """As Anthropic, DeepSeek and Z.ai have it."""

    type: str = Field(description="enabled, disabled, or another, which leaves it to the template")
    budget_tokens: ThoughtTokens | None = Field(default=None, description="with enabled: as max_reasoning_tokens")


class GenerationBody(Controls):
    """What chats and completions share."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT), WHOLE] | None = Field(
        default=None, description="keep that many tokens of the prompt's end; -1: as many as fit"
    )
    response_format: ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    return_token_ids: bool | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Conversation
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = Field(default=None, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    thinking: Thinking | None = Field(
        default=None, description="whether to think, where the chat template has a switch, and how long at most"
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None,
        description="for models whose template knows levels, or a switch, which none and minimal turn off",
    )
    max_reasoning_tokens: ThoughtTokens | None = Field(
        default=None, description="of a thought, after which its end is forced"
    )
    thinking_token_budget: ThoughtTokens | None = Field(default=None, description="vLLM's name of max_reasoning_tokens")
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as fit."""
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if wanted == -1 else wanted

    @property
    def reasoning_limit(self) -> int | None:
        return self.thinking_token_budget if self.max_reasoning_tokens is None else self.max_reasoning_tokens


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_INT), WHOLE] | None = Field(
        default=None, description="0 needs echo: score the prompt only; -1: as many as fit"
    )
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = Field(default=None, description="false: text prompts are encoded without them")

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as fit."""
        if self.max_tokens is None:
            return 16
        return None if self.max_tokens == -1 else self.max_tokens


# --- parameters that are not fields -------------------------------------------------------------------------------

IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "cache_salt",
        "request_id",
    }
)

_NO_AUDIO = "the models here write text only"
_NO_SEARCH = "this server searches nothing"
_STRUCTURED = "use response_format or structured_outputs"
_TEMPLATE = "the chat template belongs to the server's config"

# name -> (values that change nothing, besides null; why any other is refused)
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "no model here fills in the middle"),
    "best_of": ((1,), "ask for n choices, or use a ranking ensemble"),
    "use_beam_search": ((False,), "tokens are sampled"),
    "length_penalty": ((1,), "it belongs to beam search"),
    "modalities": ((["text"],), _NO_AUDIO),
    "audio": ((), _NO_AUDIO),
    "prediction": ((), "predicted outputs are not served"),
    "moderation": ((), "nothing is moderated here"),
    "web_search_options": ((), _NO_SEARCH),
    "web_search": ((False,), _NO_SEARCH),
    "functions": ((), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "verbosity": (("medium",), "the models here have no levels of verbosity"),
    "guided_json": ((), _STRUCTURED),
    "guided_regex": ((), _STRUCTURED),
    "guided_choice": ((), _STRUCTURED),
    "guided_grammar": ((), _STRUCTURED),
    "grammar": ((), _STRUCTURED),
    "json_schema": ((), _STRUCTURED),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": ((), "use logit_bias or structured_outputs"),
    "logits_processors": (([],), "code from clients is not run"),
    "chat_template": ((), _TEMPLATE),
    "documents": (([],), "put them into the messages"),
    "add_generation_prompt": ((True,), "an answer always begins with the assistant's turn"),
    "continue_final_message": ((False,), "use /v1/completions to continue a text"),
    "return_tokens_as_token_ids": ((False,), "use return_token_ids"),
    "spaces_between_special_tokens": ((True,), "tokens are joined as the tokenizer joins them"),
    "mm_processor_kwargs": ((), "the models here read text only"),
    "kv_transfer_params": ((), "one server holds the whole cache"),
    "repeat_penalty": ((1,), "its name here is repetition_penalty"),
}


class ParameterCheck:
    """What becomes of parameters that are no fields of a body."""

    def __init__(self, *, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._warned: set[str] = set()

    def ignored(self, body: BaseModel) -> list[str]:
        """Names that were ignored and that the client should hear of.

        Raises `UnsupportedError` for parameters in `REFUSED`, and under strict_params `RequestError` for unknown ones.
        """
        unknown = []
        for name, value in (body.model_extra or {}).items():
            if name in REFUSED:
                refuse(name, value)
            elif name not in IGNORED:
                unknown.append(name)
        if unknown and self._is_strict:
            known = [*type(body).model_fields, *IGNORED]
            name = shortened(unknown[0], 60)
            near = nearest(name, known).partition(" (known")[0]
            raise RequestError(f"unknown parameter {name!r}{near}", param=name)
        self._warn_once(unknown)
        return unknown

    def _warn_once(self, names: list[str]) -> None:
        for name in names:
            if name not in self._warned and len(self._warned) < 1000:  # clients choose the names
                self._warned.add(name)
                logger.warning("ignoring the unknown request parameter %r", shortened(name, 60))


def refuse(name: str, value: Any) -> None:
    """Raise `UnsupportedError` unless `value` asks for nothing. True is not 1 here, as in JSON."""
    neutral, reason = REFUSED[name]
    if value is None or any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
        return
    raise UnsupportedError(f"{name} cannot be honoured: {reason}", param=name)
