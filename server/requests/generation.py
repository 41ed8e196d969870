"""From a request's body to generations, and from their events to what all answers share.

One body may ask for several generations (a completion has one per prompt), and each of them for `n` choices.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ensemble_server.ensembles.base import (
    Choice,
    Delta,
    Done,
    GenerationRequest,
    Grammar,
    MemberUsage,
    Model,
    PromptScored,
    Sampling,
    Usage,
)
from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.engines.shared.side_by_side import side_by_side
from ensemble_server.server.requests.messages import is_integer
from ensemble_server.server.requests.protocol import ChatBody, CompletionBody, GenerationBody
from ensemble_server.server.requests.responses import EnsembleObject, MemberUsageObject, UsageObject
from ensemble_server.server.requests.terms import Terms

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

MAX_EXPLAIN_TOP = 20
LEAST_TOP_P = 1e-9  # what 0 asks for: the likeliest token alone

# --- what is asked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extension:
    """The request's `ensemble` object: whether to explain, with how many of each member's own best tokens, and what
    the method is asked to change."""

    explain: bool
    explain_top: int
    overrides: dict[str, Any]


def extension_of(body: GenerationBody) -> Extension:
    overrides = dict(body.ensemble or {})
    explain = overrides.pop("explain", None)
    if isinstance(explain, dict):
        return Extension(True, _explain_top(explain), overrides)
    if explain is not None and not isinstance(explain, bool):
        raise RequestError('ensemble.explain must be true, false or {"top": number}', param="ensemble.explain")
    return Extension(bool(explain), 0, overrides)


def _explain_top(explain: dict[str, Any]) -> int:
    """How many tokens `explain: {"top": N}` asks of each member."""
    if strangers := set(explain) - {"top"}:
        name = min(strangers)[:40]
        raise RequestError(f"unknown key 'ensemble.explain.{name}' (known: top)", param="ensemble.explain")
    top = explain.get("top", 0)
    if not is_integer(top) or not 0 <= top <= MAX_EXPLAIN_TOP:
        raise RequestError(
            f"ensemble.explain.top must be a whole number from 0 to {MAX_EXPLAIN_TOP}, got {repr(top)[:40]}",
            param="ensemble.explain.top",
        )
    return int(top)


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")


def sampling_of(body: ChatBody | CompletionBody, grammar: Grammar | None, surface: Surface | None) -> Sampling:
    """How tokens are chosen. Token ids are checked against the surface's vocabulary where there is one."""
    max_tokens, min_tokens = body.max_new_tokens, body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens, got {min_tokens} and {max_tokens}", param="min_tokens"
        )
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=max(_or(body.top_p, 1.0), LEAST_TOP_P),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, surface),
        seed=body.seed,
        stop=_stop_strings(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        grammar=grammar,
    )


def prompt_tokens_kept(body: ChatBody | CompletionBody, model: Model) -> int | None:
    """`truncate_prompt_tokens` as a number. -1: all that leaves room for the new tokens."""
    kept = body.truncate_prompt_tokens
    if kept == 0:
        raise RequestError("truncate_prompt_tokens must be at least 1, or -1", param="truncate_prompt_tokens")
    if kept != -1:
        return kept
    if model.max_model_len is None:
        raise RequestError(
            f"truncate_prompt_tokens: the context of model {model.name!r} is not known; give a number",
            param="truncate_prompt_tokens",
        )
    return max(1, model.max_model_len - (body.max_new_tokens or 1))


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Without empty ones, which front ends send for a field that was left empty."""
    return tuple(text for text in ([stop] if isinstance(stop, str) else stop or ()) if text)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _logit_bias(biases: dict[str, float], surface: Surface | None) -> dict[int, float]:
    by_id = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RequestError(f"logit_bias: keys are token ids, got {key[:40]!r}", param="logit_bias")
        token_id = int(key)
        if surface is not None and token_id >= surface.vocab_size:
            raise RequestError(
                f"logit_bias: token id {token_id} is outside the vocabulary of {surface.vocab_size}", param="logit_bias"
            )
        by_id[token_id] = bias
    return by_id


# --- what comes --------------------------------------------------------------------------------------------------


class Observer(Protocol):
    """Who wants to know how the generations of one body go."""

    def began(self, model: str) -> None: ...

    def token(self, prompt: int, choice: int) -> None:
        """The next piece of a choice is there: of which prompt, and which of its choices."""

    def read(self, num_tokens: int = 0, waited_s: float | None = None) -> None:
        """A prompt of so many tokens has waited its turn, so long if the engine tells, and is read."""

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        """An ensemble goes on without a call of a member, which gave no answer after so long."""

    def chose(self, ensemble: str, took_s: float) -> None:
        """An ensemble has chosen among its members' answers; that took so long."""

    def done(self, num_members: int, turnout: int) -> None:
        """The generations of a prompt have succeeded: of how many models that were asked how many answered."""

    def ended(self, usage: Usage | None) -> None:
        """They are over, however they ended. `usage`: of all of them; None if not all were answered."""


class Nobody:
    """Wants to know nothing."""

    def began(self, model: str) -> None:
        pass

    def token(self, prompt: int, choice: int) -> None:
        pass

    def read(self, num_tokens: int = 0, waited_s: float | None = None) -> None:
        pass

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        pass

    def chose(self, ensemble: str, took_s: float) -> None:
        pass

    def done(self, num_members: int, turnout: int) -> None:
        pass

    def ended(self, usage: Usage | None) -> None:
        pass


NOBODY = Nobody()


class Relay:
    """Passes all on to another observer; one that notes something on the way says so where it does."""

    def __init__(self, then: Observer) -> None:
        self._then = then

    def began(self, model: str) -> None:
        self._then.began(model)

    def token(self, prompt: int, choice: int) -> None:
        self._then.token(prompt, choice)

    def read(self, num_tokens: int = 0, waited_s: float | None = None) -> None:
        self._then.read(num_tokens, waited_s)

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        self._then.silent(ensemble, member, after_s)

    def chose(self, ensemble: str, took_s: float) -> None:
        self._then.chose(ensemble, took_s)

    def done(self, num_members: int, turnout: int) -> None:
        self._then.done(num_members, turnout)

    def ended(self, usage: Usage | None) -> None:
        self._then.ended(usage)


@contextmanager
def whole(observer: Observer, model: str) -> Iterator[Callable[[Usage], None]]:
    """While something is answered in one piece: `observer` is told what it used, once the block has told."""
    usage: Usage | None = None

    def used(told: Usage) -> None:
        nonlocal usage
        usage = told

    observer.began(model)
    try:
        yield used
    finally:
        observer.ended(usage)


@dataclass
class PromptAnswer:
    """What became of one prompt: its choices, and how it was read."""

    choices: list[Choice]
    prompt: PromptScored | None = None


@dataclass
class Generations:
    """The generations of one body, while they run and after. `requests` differ in their prompts only.

    `events` may be read once. `observer` is told how it goes.
    """

    model: Model
    requests: Sequence[GenerationRequest]
    hosting: Hosting
    terms: Terms
    observer: Observer = NOBODY
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    _done: dict[int, Done] = field(default_factory=dict)

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What every chunk and every answer begins with."""
        return {
            "id": f"{prefix}-{self.terms.new_id()}",
            "object": kind,
            "created": self.terms.created,
            "model": self.model.name,
            "system_fingerprint": self.hosting.fingerprint(self.model.name),
        }

    async def events(self) -> AsyncGenerator[tuple[int, PromptScored | Delta]]:
        """(index of the prompt, event), as they come. Closing it ends all generations."""
        usage: Usage | None = None
        self.observer.began(self.model.name)
        try:
            max_concurrent = max(1, self.hosting.config.engine.max_batch // self.requests[0].n)
            openers = [partial(self.model.generate, replace(request, watch=self.observer)) for request in self.requests]
            async with aclosing(side_by_side(openers, at_once=max_concurrent)) as events:
                async for place, event in events:
                    match event:
                        case Delta():
                            self.observer.token(place, event.index)
                            self.num_completion_tokens += len(event.token_ids)
                        case PromptScored():
                            self.observer.read(len(event.token_ids), event.waited_s)
                            self.num_prompt_tokens += len(event.token_ids)
                        case Done():
                            self.observer.done(len(event.members), event.turnout)
                            self._done[place] = event
                            continue
                    yield place, event
            assert len(self._done) == len(self.requests), f"model {self.model.name!r} ended without Done"
            usage = self.total
        finally:
            self.observer.ended(usage)

    async def answers(self) -> list[PromptAnswer]:
        """All generations, to their ends."""
        answers = [PromptAnswer([Choice(index) for index in range(request.n)]) for request in self.requests]
        async with aclosing(self.events()) as events:
            async for place, event in events:
                match event:
                    case Delta():
                        answers[place].choices[event.index].extend(event)
                    case PromptScored():
                        answers[place].prompt = event
        return answers

    @property
    def usage_so_far(self) -> UsageObject:
        return _usage_object(self.num_prompt_tokens, self.num_completion_tokens)

    @property
    def usage(self) -> UsageObject:
        """All generations' tokens, once they have ended."""
        total = self.total
        return _usage_object(total.prompt_tokens, total.completion_tokens, total.reasoning_tokens)

    @property
    def ensemble(self) -> EnsembleObject:
        """Who answered, once all generations have ended."""
        done = [self._done[place] for place in range(len(self.requests))]
        shown: EnsembleObject = {
            "method": done[0].method,
            "members": list(done[0].members),
            "turnout": min(one.turnout for one in done),
            "usage": {name: _member_usage(used) for name, used in self.total.members.items()},
        }
        if done[0].vocabulary is not None:
            shown["vocabulary"] = done[0].vocabulary
        if done[0].is_gated:
            shown["gate"] = True
        traces = [one.trace for one in done]
        if any(trace is not None for trace in traces):
            shown["trace"] = traces[0] if len(traces) == 1 else traces
        return shown

    @property
    def total(self) -> Usage:
        """What all generations used that have ended."""
        members: dict[str, MemberUsage] = {}
        for done in self._done.values():
            for name, used in done.usage.members.items():
                members[name] = members.get(name, MemberUsage()) + used
        return Usage(
            sum(done.usage.prompt_tokens for done in self._done.values()),
            sum(done.usage.completion_tokens for done in self._done.values()),
            members,
            sum(done.usage.reasoning_tokens for done in self._done.values()),
        )


def _usage_object(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> UsageObject:
    shown: UsageObject = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if reasoning_tokens:
        shown["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return shown


def _member_usage(used: MemberUsage) -> MemberUsageObject:
    shown: MemberUsageObject = {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens}
    if used.reasoning_tokens:
        shown["reasoning_tokens"] = used.reasoning_tokens
    if used.cost:
        shown["cost"] = used.cost
    return shown
