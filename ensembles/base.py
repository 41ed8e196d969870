"""The nouns: what is asked of a model, what it yields, and what a model must be able to do.

Everything with a name in a config is a *model*, be it one member or an ensemble of many, so ensembles nest. Two
capabilities are told apart (the line that outlines draws between black-box and steered models): every `Model` generates
text; a `DistributionModel` also gives next-token distributions, which probability averaging pools.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Message = Mapping[str, Any]  # one chat message in OpenAI's form: {"role": ..., "content": ...}
PoolName = Literal["arithmetic", "geometric", "posterior"]
AveragedOver = Literal["tokens", "bytes"]  # what members' distributions are over when they are pooled
FinishReason = Literal["stop", "length", "tool_calls"]


# --- what is asked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """What the output must match. `source`: a JSON schema as JSON text or a regular expression; "" for any object."""

    kind: Literal["json_object", "json_schema", "regex"]
    source: str = ""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the model's distribution, and when to stop. Ranges are checked at the API's door.

    `top_k`: 0 is off. `logit_bias`: token id -> logits added. `seed`: None draws a fresh one per request.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None


class Watch(Protocol):
    """Who wants to know how ensembles of texts come to their answers, whatever they are asked. Called in passing."""

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        """A call of a member has given no answer after so many seconds; the ensemble goes on without it, if it can."""

    def chose(self, ensemble: str, took_s: float) -> None:
        """The ensemble has chosen among its members' answers, which took so many seconds."""


_UNSEEN = GetPydanticSchema(lambda _source, _handler: core_schema.any_schema())  # to who writes requests down


@dataclass(frozen=True)
class NamedFunction:
    """The one function that must be called."""

    name: str


@dataclass(frozen=True)
class GenerationRequest:
    """One request to a model: exactly one of `messages` (chat) and `prompt` (raw text or token ids) is given.

    `top_logprobs`: None for no logprobs, else how many alternatives per token (0: the chosen token alone).
    `prompt_logprobs`: the same for the tokens of the prompt.
    `overrides`: the request's `"ensemble"` object less `explain`: weights, pool and what else a request may change.
    `explain`: tell how the answer came to be; `explain_top`: with each member's own most likely tokens, that many.
    `tools`: OpenAI tool definitions that the chat template renders; `template_kwargs`: what else it is told.
    `tool_choice`: "auto" leaves it to the model whether it calls; "required" and the name of a function do not (where
    the model is hosted here, `sampling.grammar` forces the call). `parallel_tool_calls`: whether there may be several.
    `reasoning_effort`: how much a model that thinks should think, where its template knows levels; "none": not at all.
    `thinks`: whether to think at all; None: as the effort says, or else the template.
    `max_reasoning_tokens`: of a thought, after which its end is forced; None: no limit.
    `deadline_s`: seconds from now after which the model answers with what it has, or raises `DeadlineError`.
    `priority`: lower values are scheduled first; 0 is interactive.
    `watch`: is told how ensembles of texts go; no part of what is asked.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    explain: bool = False
    explain_top: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Literal["auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    thinks: bool | None = None
    max_reasoning_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    deadline_s: float | None = None
    priority: int = 0
    request_id: str = ""
    watch: Annotated[Watch | None, Field(exclude=True), _UNSEEN] = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None), "exactly one of messages and prompt must be given"

    @property
    def told_template(self) -> Mapping[str, Any]:
        """What the chat template is told besides messages and tools."""
        told: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            told["reasoning_effort"] = self.reasoning_effort
        if (thinks := self.wants_thoughts) is not None:  # templates that know no levels have a switch
            told |= dict.fromkeys(THOUGHT_SWITCHES, thinks)
        return told | dict(self.template_kwargs)

    @property
    def wants_thoughts(self) -> bool | None:
        """Whether a model that can is to think before it answers; None leaves that to its template."""
        return wants_thoughts(self.reasoning_effort, self.thinks)


THOUGHT_SWITCHES = ("enable_thinking", "thinking")  # as templates call it: Qwen, GLM, SmolLM; DeepSeek, Granite, Kimi


def wants_thoughts(effort: str | None, thinks: bool | None) -> bool | None:
    """("low", None) -> True; ("minimal", None) -> False; ("low", False) -> False"""
    if thinks is not None or effort is None:
        return thinks
    return effort not in ("none", "minimal")


class When(BaseModel):
    """Where a mixture is not left to its main member: exactly one threshold (`ensembles.pooling.selective`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entropy: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    disagree: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _is_one_rule(self) -> When:
        if (self.entropy is None) == (self.disagree is None):
            raise ValueError("must be {entropy: nats} or {disagree: a number from 0 to 1}: one of the two")
        return self


GATE_FEATURES = ("entropy", "distance", "recent_4", "recent_16", "recent_64", "posterior", "early_posterior")
GATE_CONTEXT = ("bias", "spread", "mean_entropy", "early", "entropy")


class GateTerm(BaseModel):
    """A feature that counts alike for all members: `weight` per `scale` of it (one standard deviation in training)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(gt=0, allow_inf_nan=False)
    weight: float = Field(allow_inf_nan=False)


class GateContext(BaseModel):
    """`mean` and `scale` of a feature that counts for each member in its own way, as they were in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float = Field(allow_inf_nan=False)
    scale: float = Field(gt=0, allow_inf_nan=False)


class GateMember(BaseModel):
    """`identity`: of the member's entry in the config; `prior`: its weight, as a part of 1; `slopes`: what each feature
    of the context counts for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    prior: float = Field(gt=0, le=1, allow_inf_nan=False)
    slopes: Mapping[str, Annotated[float, Field(allow_inf_nan=False)]]


class Gate(BaseModel):
    """What `ensemble fit --gate` has learnt: it moves a posterior pool's weights, token by token (`pooling.gated`).

    `share`: of the posterior pool that it was trained on top of. `features`, `context`: what they are is said there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float | Literal["auto"]
    features: Mapping[str, GateTerm]
    context: Mapping[str, GateContext]
    members: Mapping[str, GateMember] = Field(min_length=2)

    @model_validator(mode="after")
    def _knows_its_features(self) -> Gate:
        slopes = {f"members.{name}.slopes": (member.slopes, GATE_CONTEXT) for name, member in self.members.items()}
        parts = {"features": (self.features, GATE_FEATURES), "context": (self.context, GATE_CONTEXT), **slopes}
        for at, (found, wanted) in parts.items():
            if set(found) != set(wanted):
                raise ValueError(f"{at} must be {', '.join(wanted)}; it has {', '.join(found)}; train the gate again")
        return self


@dataclass(frozen=True)
class Mixture:
    """Which members run, with which weights, and how their distributions are pooled. Weights of zero are left out.

    `share` (posterior only) is the fixed share that flows back to the prior at every token (or byte); 0 is plain Bayes,
    "auto" a share that is learnt (`ensembles.pooling.learned_share`).
    `vocabulary`: "auto" pools over tokens where all members have the same, else over bytes; "bytes" always does that.
    `heals`: whether members that are pooled over bytes begin before the last word of a raw prompt.
    `when`: where members have a say besides the main one; None: everywhere.
    `gate` (posterior only): what moves the weights that follow the text at each token; None: nothing does.
    """

    weights: Mapping[str, float]
    pool: PoolName = "arithmetic"
    share: float | Literal["auto"] = 0.0
    vocabulary: Literal["auto", "bytes"] = "auto"
    heals: bool = True
    when: When | None = None
    gate: Gate | None = None

    @property
    def main(self) -> str:
        """The member that weighs most, the first of equals: with `when` the one that writes."""
        return max(self.weights, key=lambda name: self.weights[name])


# --- what is yielded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemberToken:
    """What one member gave the chosen token (`logprob`, nats), and the weight it had when the token was chosen.

    `top`: the member's own most likely tokens, best first, if `explain_top` was asked for.
    """

    logprob: float
    weight: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """One token under the model's own distribution, before temperature and truncation. Logarithms are natural.

    `logprob` is None only for the first token of a prompt, which nothing predicts. `bytes` are the token's own bytes,
    which need not be whole UTF-8 characters. `top` holds the most likely tokens, best first. The last three are there
    when `explain` was asked for: each member's view, the pooled entropy and the members' Jensen-Shannon divergence.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    members: Mapping[str, MemberToken] | None = None
    entropy: float | None = None
    disagreement: float | None = None


@dataclass(frozen=True)
class PromptScored:
    """The prompt as the model read it; the first event. `tokens` is filled if `prompt_logprobs` was asked for.

    `waited_s`: how long the request waited for its turn; None where the engine does not tell.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[TokenLogprob, ...] = ()
    waited_s: Annotated[float | None, Field(exclude=True)] = field(default=None, compare=False)


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of tool call `index` of a choice, counted from 0. The first piece has the `name`, and the `id` if
    the model gave one; `arguments` are joined."""

    index: int
    name: str | None
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Delta:
    """The next piece of choice `index`. `text` never breaks inside a UTF-8 character, so it may lag behind `token_ids`.

    `reasoning` is text about how the answer came to be (an exchange's rounds), not part of it. `calls` are pieces of
    tool calls, which are no part of the text either; in a delta that has both, the text came first. The last delta of a
    choice has a `finish_reason`; `stop_reason` is then the stop string or stop token id that ended it, if one did.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True)
class MemberUsage:
    """Tokens that one member read (prompt) and wrote (completion); `cost` in the config's currency. `reasoning_tokens`:
    those of the completion that are thoughts, markers included, as far as they are told apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    reasoning_tokens: int = 0

    def __add__(self, other: MemberUsage) -> MemberUsage:
        return MemberUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True)
class Usage:
    """What the answer as a whole used, as OpenAI counts it, and what each member did for it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    members: Mapping[str, MemberUsage] = field(default_factory=dict)
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Done:
    """Ends every successful generation.

    `turnout`: how many of `members` answered. `trace`: method-specific, JSON-ready, only if `explain` was asked for.
    `vocabulary`: what distributions of members were averaged over; None where none were. `is_gated`: whether a learned
    gate moved the weights of that average.
    """

    usage: Usage
    method: str
    members: tuple[str, ...]
    turnout: int
    trace: Mapping[str, Any] | None = None
    vocabulary: AveragedOver | None = None
    is_gated: bool = False


Event = PromptScored | Delta | Done


# --- who answers -------------------------------------------------------------------------------------------------


@runtime_checkable
class Model(Protocol):
    """Anything that a client can talk to.

    `generate` is an async generator: it yields one `PromptScored` if the model reads tokens itself (remote models and
    text-level ensembles may leave it out), then `Delta`s (choices may interleave), then one `Done`. Closing it early
    (`aclose`, or cancelling the task) frees all that it holds. Errors are those of `ensembles.errors`, and those of
    `RequestError` come before the first event.
    """

    name: str
    members: tuple[str, ...]  # names of the models it consults; its own name for a single model
    max_model_len: int | None  # tokens of prompt and completion together; None if only the remote end knows
    explains_tokens: bool  # whether `explain` may turn its log-probabilities on: it has tokens, and they are known here

    @property
    def fan_out(self) -> int:
        """How many calls of single models one choice may keep running at the same time. A mixture runs as one."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]: ...


@runtime_checkable
class DistributionModel(Model, Protocol):
    """A model that gives next-token distributions: a mixture (of one or more members) on a host."""

    host: MixtureHost
    mixture: Mixture


class MixtureHost(Protocol):
    """Holds loaded members and runs mixtures of them: an engine."""

    def check(self, mixture: Mixture) -> None:
        """Raise `ModelLoadError` if these members cannot be pooled (unknown, or of vocabularies that this host cannot
        bring together)."""

    def averages_over(self, mixture: Mixture) -> AveragedOver:
        """What the distributions of these members are over. Raises `ModelLoadError` as `check` does."""
        ...

    def max_model_len(self, mixture: Mixture) -> int: ...

    def ends_thoughts(self, mixture: Mixture) -> bool:
        """Whether `max_reasoning_tokens` can be honoured; where nobody thinks it is."""
        ...

    def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]: ...

    async def visit_logprobs(
        self,
        members: Sequence[str],
        token_ids: Sequence[int],
        visit: Callable[[Tensor, Tensor], None],
        *,
        priority: int = 1,
    ) -> None:
        """Let each member read a text once and show what it expected: `visit(logprobs, targets)` for every chunk.

        logprobs: (K, t, V) float32, normalised over V, in the order of `members`; targets: (t,) int64, the tokens that
        came. The chunks come in order, and their targets are all of `token_ids` but the first, which nothing predicts;
        a text of fewer than two tokens has none. Both tensors are only lent: keep what you compute of them. What
        `visit` raises ends this call alone and is raised here. Cancelling the call ends the reading.

        Raises `ModelLoadError` for members that are unknown or differ in vocabulary, `ContextLengthError` for a text
        that is longer than their context, `RequestError` for a token id outside the vocabulary.
        """

    async def visit_bytes(
        self,
        members: Sequence[str],
        text: str,
        visit: Callable[[Tensor, Tensor], None],
        *,
        after: Sequence[Message] | None = None,
        priority: int = 1,
    ) -> None:
        """`visit_logprobs` for members of any vocabularies, over text: one call of `visit(logprobs, targets)`.

        logprobs: (K, t, 257) float64, of the 256 bytes and the end of the text; targets: (t,) int64, the bytes that
        came. They are all of the text but the first few that not every member can expect: those of the first token of a
        member whose tokenizer puts none before a text. What stands for a byte that came is the evidence for it,
        log P(text up to it) less that before it, with other ways to spell the text summed out. `after`: a conversation
        that each member reads first, in its own rendering; the text is then expected from its first byte on.

        Raises `ModelLoadError` for members whose tokens are not bytes, `ContextLengthError` for a text that is longer
        than their context, `RequestError` for one that a member does not read byte for byte.
        """


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    name: str

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), dim) float32, rows of length one; equal texts give equal rows."""
        ...


class Reranker(Protocol):
    """Scores answers to a prompt."""

    async def score(self, prompt: str, texts: Sequence[str]) -> np.ndarray:
        """(len(texts),) float64, higher is better."""
        ...


# --- reading a whole answer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolCall:
    """A function that a model asks for. `arguments`: a JSON object as the model wrote it, or its beginning if the
    answer was cut off. `id`: if the model gave one."""

    name: str
    arguments: str = "{}"
    id: str | None = None


@dataclass
class Choice:
    """One finished choice of an answer."""

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def is_blank(self) -> bool:
        return not self.text.strip() and not self.calls

    def extend(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.token_ids += delta.token_ids
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason
        for piece in delta.calls:
            if piece.name is not None:
                self.calls.append(ToolCall(piece.name, piece.arguments, piece.id))
            else:
                call = self.calls[piece.index]
                self.calls[piece.index] = replace(call, arguments=call.arguments + piece.arguments)


@dataclass(frozen=True)
class Answer:
    """A whole generation, collected."""

    choices: tuple[Choice, ...]
    done: Done
    prompt: PromptScored | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


async def collect(model: Model, request: GenerationRequest) -> Answer:
    """Run `request` to its end and return the whole answer."""
    choices = [Choice(index) for index in range(request.n)]
    prompt, done = None, None
    async for event in model.generate(request):
        match event:
            case PromptScored():
                prompt = event
            case Delta():
                choices[event.index].extend(event)
            case Done():
                done = event
    assert done is not None, f"model {model.name!r} ended without Done"
    return Answer(tuple(choices), done, prompt)
