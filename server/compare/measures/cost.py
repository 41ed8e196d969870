"""What an arm costs: answer tokens per second, time to the first token, forwards, memory, remote spend.

All arms are measured in turns, in a new order in each round, so that a machine that gets slower or busier does so for
all of them, and none always follows the same other one. The first round is short, warms up and is dropped. Every
request has a prompt of its own, so that no arm profits from what another one (or it itself) has read before.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ensemble_server.ensembles.base import Delta, Done, GenerationRequest, Model, Sampling, Usage
from ensemble_server.ensembles.comparison.rounds import of_rounds, ratios
from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.server.compare.kept.records import CostRecord
from ensemble_server.server.compare.kept.results import Cost, Timing
from ensemble_server.server.compare.measures.cost_settings import CostSettings

CHARS_PER_TOKEN = 4  # of the prompts; their exact length does not matter, only that it is the same for all arms
WARM_UP_TOKENS = 4  # of an answer that is not measured


@dataclass
class ForwardCounter:
    """Tokens that members forwarded, prompt and answer: what `Hosting.open(on_step=...)` is told."""

    num_tokens: int = 0

    def __call__(self, stats: object) -> None:
        self.num_tokens += sum(stats.num_tokens.values())  # type: ignore[attr-defined]


@dataclass
class Measured:
    """What the rounds of one arm gave so far. `is_told`: no remote member kept its forwards to itself. `error`: it is
    not asked again once it failed."""

    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    forward_tokens: int = 0
    answer_tokens: int = 0
    spend: float = 0.0
    is_told: bool = True
    error: str | None = None


class Prompts:
    """Pieces of a text, each starting elsewhere. Equal calls give equal prompts."""

    def __init__(self, text: str, num_tokens: int) -> None:
        self._text = text
        self._length = min(num_tokens * CHARS_PER_TOKEN, len(text))
        self._num_given = 0

    def next(self) -> str:
        # subtle: a step that shares no factor with most lengths, so that starts repeat only after a whole turn
        start = (self._num_given * 997) % len(self._text)
        self._num_given += 1
        return (self._text[start:] + self._text)[: self._length]


async def measure_cost(
    models: Mapping[str, Model],
    settings: CostSettings,
    text: str,
    counter: ForwardCounter,
    count_tokens: Callable[[str], int],
    *,
    is_chat: bool = True,
    remote: Sequence[str] = (),
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Measured]:
    """Arm -> figures.

    `text`: what prompts are cut from. `counter`: hears every step of the engine. `count_tokens`: of an answer whose
    model gives text alone. `is_chat`: asked as a user's message, else as raw text to be continued. `remote`: members
    whose forwards only their usage tells.
    """
    measured = {name: Measured() for name in models}
    prompts = Prompts(text, settings.prompt_tokens)
    num_rounds = settings.repeats + 1
    order = random.Random(0)
    for number in range(num_rounds):
        is_warm_up = number == 0
        max_tokens = min(settings.max_tokens, WARM_UP_TOKENS) if is_warm_up else settings.max_tokens
        for concurrency in settings.concurrency:
            for name in order.sample(list(models), len(models)):
                model, figures = models[name], measured[name]
                if figures.error is None:
                    requests = [_request(prompts.next(), max_tokens, seed, is_chat) for seed in range(concurrency)]
                    try:
                        await _round(
                            model, concurrency, settings, requests, figures, counter, count_tokens, remote, is_warm_up
                        )
                    except EnsembleError as exc:
                        figures.error = str(exc)
        on_round(number + 1, num_rounds)
    return measured


async def _round(
    model: Model,
    concurrency: int,
    settings: CostSettings,
    requests: Sequence[GenerationRequest],
    figures: Measured,
    counter: ForwardCounter,
    count_tokens: Callable[[str], int],
    remote: Sequence[str],
    is_warm_up: bool,
) -> None:
    before = counter.num_tokens
    started = time.perf_counter()
    answers = await asyncio.gather(*(_timed(model, request) for request in requests))
    seconds = time.perf_counter() - started
    num_tokens = sum(answer.num_tokens or min(count_tokens(answer.text), settings.max_tokens) for answer in answers)
    if is_warm_up or not num_tokens:
        return
    figures.tokens_per_s.setdefault(str(concurrency), []).append(num_tokens / seconds)
    if concurrency == min(settings.concurrency):
        figures.ttft_s.append(float(np.mean([answer.ttft_s for answer in answers])))
    figures.seconds += seconds
    figures.answer_tokens += num_tokens
    figures.forward_tokens += counter.num_tokens - before
    for answer in answers:
        figures.spend += sum(member.cost for member in answer.usage.members.values())
        told = [
            member.prompt_tokens + member.completion_tokens
            for name, member in answer.usage.members.items()
            if name in remote
        ]
        figures.forward_tokens += sum(told)
        figures.is_told = figures.is_told and all(told)


def _request(prompt: str, max_tokens: int, seed: int, is_chat: bool) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True)
    if not is_chat:
        return GenerationRequest(prompt=prompt, sampling=sampling)
    return GenerationRequest(messages=({"role": "user", "content": prompt},), sampling=sampling)


@dataclass
class _Answer:
    """`num_tokens`: of the answer itself, where the model says them; a text-level ensemble gives text alone."""

    ttft_s: float = 0.0
    num_tokens: int = 0
    text: str = ""
    usage: Usage = field(default_factory=Usage)


async def _timed(model: Model, request: GenerationRequest) -> _Answer:
    started = time.perf_counter()
    answer = _Answer()
    async for event in model.generate(request):
        if isinstance(event, Delta):
            answer.ttft_s = answer.ttft_s or time.perf_counter() - started
            answer.num_tokens += len(event.token_ids)
            answer.text += event.text
        elif isinstance(event, Done):
            answer.usage = event.usage
    return answer


def as_record(
    figures: Measured,
    *,
    inputs: str,
    weights_bytes: int | None,
    kv_bytes: int | None,
    kv_tokens: int,
    is_priced: bool = True,
) -> CostRecord:
    """What is not known stays None: memory of remote models, forwards that no engine counted or endpoint told, and
    money where some price is not known (`is_priced`)."""
    per_token = figures.answer_tokens or None
    forwards = (figures.forward_tokens or None) if figures.is_told else None
    return CostRecord(
        inputs=inputs,
        tokens_per_s=figures.tokens_per_s,
        ttft_s=figures.ttft_s,
        seconds_per_answer_token=per_token and figures.seconds / per_token,
        forward_tokens_per_answer_token=per_token and forwards and forwards / per_token,
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        spend=figures.spend if is_priced else None,
        skipped=figures.error,
    )


def summarise(record: CostRecord | None, baseline: CostRecord | None, *, level: float) -> Cost:
    """Medians of the rounds; `baseline`: whose rounds ratios are taken to, None for the baseline itself."""
    if record is None:
        return Cost()
    theirs = {} if baseline is None else baseline.tokens_per_s
    return Cost(
        tokens_per_s={streams: _timing(values, level) for streams, values in record.tokens_per_s.items() if values},
        speed_ratio={
            streams: _timing(found, level)
            for streams, values in record.tokens_per_s.items()
            if (found := ratios(values, theirs.get(streams, ())))
        },
        ttft_s=_timing(record.ttft_s, level) if record.ttft_s else None,
        weights_bytes=record.weights_bytes,
        kv_bytes=record.kv_bytes,
        kv_tokens=record.kv_tokens,
        forward_tokens_per_answer_token=record.forward_tokens_per_answer_token,
        spend=record.spend,
    )


def _timing(values: Sequence[float], level: float) -> Timing:
    found = of_rounds(values, level=level)
    interval = found.interval and (found.interval.low, found.interval.high)
    return Timing(median=found.median, ci=interval, values=tuple(values), range=(found.lowest, found.highest))
