"""Samples of one row until a vote on them is decided: {"n": 8, "stop_when_decided": "number", …} in its body.

Samples come in waves. A wave holds as many as would decide the vote if they all agreed with its leader, and no fewer
could, so no sample is asked for that the vote turns out not to need; those that are not needed never begin, which
costs less than to cancel them. Other rows keep the engine busy meanwhile. The k-th sample has the same seed however
many are asked for, so the answer does not depend on what else ran.

The answer has the choices that were asked for, and a `vote` beside them. A sample that fails abstains; if all do, the
row has the first one's error. Ensembles do the same among their members with the method `majority`.

Reference: Aggarwal et al., "Let's sample step by step", 2023, https://arxiv.org/abs/2305.11860 (adaptive consistency;
it also stops when a vote is merely unlikely to change, here it cannot).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from ensemble_server.ensembles.base import Usage
from ensemble_server.ensembles.errors import EngineDeadError, EnsembleError, OverloadedError, RequestError
from ensemble_server.ensembles.fan_out import total_usage
from ensemble_server.ensembles.text_level import derived_seed
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.majority import PENDING, Vote, agreement, num_to_decide, plurality, tally
from ensemble_server.ensembles.voting.tool_calls import calls_of
from ensemble_server.server.batch.job.identity import body_digest, ids_from
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.requests.terms import Terms

STOP_WHEN_DECIDED = "stop_when_decided"  # the key of a body
MAX_SAMPLES = 128  # as the API's `n`

Body = Mapping[str, Any]
Ask = Callable[[Row, Terms], Awaitable[tuple[Body, Usage]]]


@dataclass(frozen=True)
class _Sample:
    """Exactly one of `body` and `error` is there. `text`: of its one choice."""

    number: int
    body: Body | None
    usage: Usage
    error: EnsembleError | None = None

    @property
    def text(self) -> str | None:
        if self.body is None:
            return None
        choice = self.body["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    def vote(self, kind: AnswerKind) -> str | None:
        """Its answer: the tools that it calls, or else what is found in its text."""
        if self.body is not None and (calls := calls_of(self.body["choices"][0].get("message", {}))):
            return calls
        return None if self.text is None else extract(self.text, kind)


async def answer_until_decided(row: Row, terms: Terms, ask: Ask) -> tuple[dict[str, Any], Usage]:
    """The answer to `row` and what it used. `ask` answers one sample: a row of one choice, without the key.

    Raises `RequestError` if the row cannot be voted on, and what `ask` raises if every sample fails.
    """
    kind, num_samples = _plan(row)
    clock = asyncio.get_running_loop().time
    end = None if terms.deadline_s is None else clock() + terms.deadline_s
    samples: list[_Sample] = []
    votes: list[Vote] = [PENDING] * num_samples
    weights = [1.0] * num_samples
    while (size := num_to_decide(votes, weights)) and not (samples and end is not None and clock() >= end):
        left = replace(terms, deadline_s=None if end is None else max(0.0, end - clock()))
        wave = await _wave(row, left, ask, range(len(samples), len(samples) + size))
        samples += wave
        votes[: len(samples)] = [sample.vote(kind) for sample in samples]
    answered = [sample for sample in samples if sample.body is not None]
    if not answered:
        assert samples[0].error is not None, "a sample has a body or an error"
        raise samples[0].error
    cast = votes[: len(samples)]
    return _joined(answered, samples, cast, num_samples), total_usage(sample.usage for sample in samples)


def _plan(row: Row) -> tuple[AnswerKind, int]:
    kind, num_samples = row.body[STOP_WHEN_DECIDED], row.body.get("n", 1)
    if kind not in get_args(AnswerKind):
        raise RequestError(
            f"{STOP_WHEN_DECIDED} must be one of {', '.join(get_args(AnswerKind))}, got {kind!r:.60}",
            param=STOP_WHEN_DECIDED,
        )
    if row.url not in ("/v1/chat/completions", "/v1/completions"):
        raise RequestError(f"{STOP_WHEN_DECIDED}: {row.url} draws no samples", param=STOP_WHEN_DECIDED)
    if type(num_samples) is not int or not 1 <= num_samples <= MAX_SAMPLES:
        raise RequestError(f"n must be a whole number from 1 to {MAX_SAMPLES}, got {num_samples!r:.60}", param="n")
    if isinstance(row.body.get("prompt"), list):
        raise RequestError(f"{STOP_WHEN_DECIDED}: takes one prompt of text, not a list", param="prompt")
    return kind, num_samples


async def _wave(row: Row, terms: Terms, ask: Ask, numbers: range) -> list[_Sample]:
    tasks = [asyncio.create_task(_sample(row, terms, ask, number)) for number in numbers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _sample(row: Row, terms: Terms, ask: Ask, number: int) -> _Sample:
    body = {key: value for key, value in row.body.items() if key != STOP_WHEN_DECIDED} | {"n": 1}
    if number and body.get("seed") is not None:
        body["seed"] = derived_seed(body["seed"], "choice", number)
    single = replace(row, body=body)
    try:
        answered, usage = await ask(single, replace(terms, new_id=ids_from(body_digest(single))))
    except (OverloadedError, EngineDeadError):
        raise
    except EnsembleError as exc:
        return _Sample(number, None, Usage(), exc)
    return _Sample(number, answered, usage)


def _joined(
    answered: Sequence[_Sample], samples: Sequence[_Sample], votes: Sequence[Vote], num_samples: int
) -> dict[str, Any]:
    """The first answer, with everybody's choices and sums of what they used."""
    bodies = [sample.body for sample in answered if sample.body is not None]
    cast = [votes[sample.number] for sample in answered]
    winner = plurality(cast, [1.0] * len(cast))
    sums = tally(cast, [1.0] * len(cast))
    joined = {
        **bodies[0],
        "choices": [{**body["choices"][0], "index": index} for index, body in enumerate(bodies)],
        "usage": _summed([body["usage"] for body in bodies]),
    }
    if "ensemble" in joined:
        joined["ensemble"] = _ensemble([body["ensemble"] for body in bodies])
    joined["vote"] = {
        "answer": winner,
        "winner": cast.index(winner),
        "answers": cast,
        "votes": {answer: int(total) for answer, total in sums.items()},
        "agreement": agreement(sums),
        "samples": num_samples,
        "samples_saved": num_samples - len(samples),
        "silent": [{"sample": one.number, "reason": str(one.error)} for one in samples if one.error is not None],
    }
    return joined


def _ensemble(reports: Sequence[Body]) -> dict[str, Any]:
    """Who answered, in all samples together."""
    members = dict.fromkeys(name for report in reports for name in report["usage"])
    joined = {
        **reports[0],
        "turnout": min(report["turnout"] for report in reports),
        "usage": {
            name: _summed([report["usage"][name] for report in reports if name in report["usage"]]) for name in members
        },
    }
    if any("trace" in report for report in reports):
        joined["trace"] = {"choices": [report.get("trace") for report in reports]}
    return joined


def _summed(usages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """[{"a": 1}, {"a": 2, "b": 3}] -> {"a": 3, "b": 3}"""
    names = dict.fromkeys(name for usage in usages for name in usage)
    return {name: sum(usage.get(name, 0) for usage in usages) for name in names}
