"""What all methods above tokens share: what they cannot honour, what a request may change, and how it reaches members.

Such a method sees its members' texts only, so members may be anything that answers, with any tokenizer. It derives from
`TextLevel`, which does all that comes before the idea, and writes `reply`.
"""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar, final

from pydantic import Field, ValidationError, model_validator

from ensemble_server.ensembles.base import Choice, Delta, Done, Event, GenerationRequest, Model, ToolCallDelta
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.fan_out import Call, fan_out, total_usage
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.ensembles.overrides import check_overrides


class EmbeddingNeed(NamedTuple):
    """What in a config needs an embedding model: its key, in words, and the way out where there is none."""

    key: str
    what: str
    otherwise: str


class TextLevelConfig(MethodConfig):
    """Keys of every method that fans out to its members."""

    min_turnout: int = Field(
        default=1, ge=1, description="members that must answer; fewer is an error that names the others"
    )
    member_timeout_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="seconds after which a member counts as silent; null waits"
    )

    @model_validator(mode="after")
    def _turnout_can_be_met(self) -> TextLevelConfig:
        num_members = sum(1 for weight in self.members.values() if weight)
        if self.min_turnout > num_members:
            raise ValueError(
                f"min_turnout is {self.min_turnout}, but there are {num_members} members with a weight other than zero"
            )
        return self

    def deadline_s(self, request: GenerationRequest) -> float | None:
        """Seconds that members get: the smaller of `member_timeout_s` and the request's own deadline."""
        limits = [limit for limit in (self.member_timeout_s, request.deadline_s) if limit is not None]
        return min(limits, default=None)

    def embedding_need(self) -> EmbeddingNeed | None:
        """Methods that compare texts by an embedding model say so; None: this config needs none."""
        return None


class TextLevel(Method):
    """A method whose reply is made of its members' texts.

    Its `Config` is a `TextLevelConfig`. A reply is one choice: a request for several is answered by as many replies,
    each with seeds of its own. Methods of which one model writes the reply may say otherwise by the two flags.
    """

    overridable: ClassVar[tuple[str, ...]] = ("weights", "min_turnout")  # keys that a request may change
    writes_choices: ClassVar[bool] = False  # whether one reply has all choices that are asked for
    gives_logprobs: ClassVar[bool] = False  # whether the reply is one model's, with its log-probabilities

    config: TextLevelConfig

    def __init__(self, name: str, config: TextLevelConfig, models: Mapping[str, Model], services: Services) -> None:
        super().__init__(name, config, models, services)
        if services.embedder is None and (need := config.embedding_need()) is not None:
            raise ModelLoadError(
                f"model {name!r}: {need.what} needs an embedding model; set one up, or {need.otherwise}"
            )

    @final
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        asked = replace(request, top_logprobs=None) if self.gives_logprobs else request
        check_text_level(asked, ensemble=self.name, method=self.config.method)
        config = overridden(self.config, request, self.overridable)
        check_num_calls(self, config, num_replies=1 if self.writes_choices else request.n)
        if self.services.embedder is None and (need := config.embedding_need()) is not None:
            raise UnsupportedError(
                f"{need.what} needs an embedding model, and this server has none; {need.otherwise}",
                param=f"ensemble.{need.key}",
            )
        is_split = request.n > 1 and not self.writes_choices
        async with aclosing(independent_choices(self, request) if is_split else self.reply(request, config)) as events:
            async for event in events:
                yield event

    @abstractmethod
    def reply(self, request: GenerationRequest, config: Any) -> AsyncGenerator[Event, None]:
        """The events of one reply, as `generate` has them. `config` is that of the method, changed by the request."""


MAX_CHOICES_AT_ONCE = 4  # each is a fan-out of its own

C = TypeVar("C", bound=MethodConfig)


def overridden(config: C, request: GenerationRequest, allowed: Collection[str]) -> C:
    """`config` with what the request's "ensemble" object changes. `weights` stands for the `members` map.

    Raises `RequestError` naming the field if it is not in `allowed` or its value breaks the config's own rules.
    """
    changes = dict(request.overrides)
    if not changes:
        return config
    check_overrides(changes, allowed, config.members)
    if "weights" in changes:
        changes["members"] = changes.pop("weights")
    try:
        return type(config).model_validate({**config.model_dump(), **changes})
    except ValidationError as exc:
        finding = exc.errors(include_url=False, include_input=False)[0]
        path = [str(part) for part in finding["loc"]]
        field = ".".join(["ensemble", *("weights" if part == "members" else part for part in path)])
        raise RequestError(f"{field}: {finding['msg']}", param=field) from exc


def check_num_calls(method: Method, config: MethodConfig, *, num_replies: int) -> None:
    """Raise `RequestError` if so many replies under `config` could take more calls than one request may."""
    limit = method.services.max_calls
    num_calls = num_replies * method.num_calls(config)
    if limit is not None and num_calls > limit:
        raise RequestError(
            f"model {method.name!r}: this request could take {num_calls} calls of models, server.max_calls is {limit}; "
            "ask for fewer choices, samples or rounds",
            param="n" if num_replies > 1 else "ensemble",
        )


def check_text_level(request: GenerationRequest, *, ensemble: str, method: str) -> None:
    """Raise `UnsupportedError` for what only a single token distribution could honour."""
    sampling = request.sampling
    asked = {
        "logprobs": request.top_logprobs is not None,
        "prompt_logprobs": request.prompt_logprobs is not None,
        "logit_bias": bool(sampling.logit_bias),
        "stop_token_ids": bool(sampling.stop_token_ids),
        "prompt": isinstance(request.prompt, tuple),
        "truncate_prompt_tokens": request.truncate_prompt_tokens is not None,
    }
    for param, is_asked in asked.items():
        if is_asked:
            what = "a prompt of token ids" if param == "prompt" else param
            raise UnsupportedError(
                f"model {ensemble!r} ({method}) answers with its members' texts, which have no token ids in common, "
                f"so it cannot honour {what}; ask a single model or a probability average",
                param=param,
            )


def derived_seed(seed: int | None, *path: str | int) -> int | None:
    """A seed of its own for each place on `path`, the same at every run; None stays None (a fresh draw each time).

    (7, "base", 0) -> 31 bits, so that remote servers with 32-bit seeds take it.
    """
    if seed is None:
        return None
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def member_request(
    request: GenerationRequest, member: str, sample: int = 0, *, temperature: float | None = None
) -> GenerationRequest:
    """`request` as one member gets it for one sample: a single choice, a seed of its own, no overrides.

    `explain` stays, so that a member that is an ensemble itself gives its trace. `temperature` replaces the request's.
    """
    sampling = replace(request.sampling, seed=derived_seed(request.sampling.seed, member, sample))
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    return replace(request, sampling=sampling, n=1, overrides={})


@contextmanager
def timed_choice(request: GenerationRequest, ensemble: str) -> Iterator[None]:
    """While the block chooses among the members' answers: whoever watches the request is told how long it took."""
    began = time.perf_counter()
    yield
    if request.watch is not None:
        request.watch.chose(ensemble, time.perf_counter() - began)


def as_delta(choice: Choice, *, index: int = 0) -> Delta:
    """A member's finished choice as the whole of choice `index`, without its token ids, which only it can read."""
    return Delta(
        index,
        choice.text,
        reasoning=choice.reasoning,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        calls=tuple(
            ToolCallDelta(place, call.name, call.arguments, call.id) for place, call in enumerate(choice.calls)
        ),
    )


async def independent_choices(model: Model, request: GenerationRequest) -> AsyncGenerator[Event, None]:
    """A request for n > 1 choices as n requests for one, some at the same time, each with a seed of its own.

    The first choice is what the request for one choice would give. All must succeed: the first error is raised.
    """
    seeds = [request.sampling.seed, *(derived_seed(request.sampling.seed, "choice", k) for k in range(1, request.n))]
    singles = [replace(request, n=1, sampling=replace(request.sampling, seed=seed)) for seed in seeds]
    calls = [Call(model.name, model, single, sample) for sample, single in enumerate(singles)]
    outcomes = await fan_out(calls, ensemble=model.name, at_once=MAX_CHOICES_AT_ONCE)
    answers = []
    for outcome in outcomes:
        if outcome.answer is None:
            raise outcome.error
        answers.append(outcome.answer)
    for index, answer in enumerate(answers):
        yield as_delta(answer.choices[0], index=index)
    yield Done(
        total_usage(outcome.usage for outcome in outcomes),
        answers[0].done.method,
        answers[0].done.members,
        turnout=min(answer.done.turnout for answer in answers),
        trace={"choices": [answer.done.trace for answer in answers]} if request.explain else None,
    )
