"""What a job will need, before it runs: the tokens of every prompt by counting, the rest from a few rows as a probe.

time = rows / rows per second of the probe. The probe's rows run side by side, but fewer than a job's do, so a job of
many rows tends to be faster than this; the lengths of its answers are as uncertain as a sample of this size.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import GenerationRequest, MemberUsage
from ensemble_server.ensembles.errors import ContextLengthError, EnsembleError
from ensemble_server.server.batch.job.identity import seeded
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.running.answering import answer, row_body
from ensemble_server.server.requests.chat import chat_request
from ensemble_server.server.requests.completions import completion_requests
from ensemble_server.server.requests.errors import error_object
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.protocol import ChatBody, CompletionBody
from ensemble_server.server.requests.reasoning import asked_thoughts
from ensemble_server.server.requests.terms import Terms
from ensemble_server.server.requests.tool_use import asked_tools

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

NUM_REFUSED_SHOWN = 5


@dataclass
class PromptCount:
    """Tokens of the prompts that can be asked, as the first member reads them, and what of the rest would be refused.

    Rows that generate nothing, and those of remote models, are asked without being counted.
    """

    num_counted: int = 0
    num_tokens: int = 0
    longest: int = 0
    num_refused: int = 0
    refused: list[str] = field(default_factory=list)

    def add(self, row: Row, hosting: Hosting) -> None:
        try:
            tokens = num_prompt_tokens(row, hosting)
        except EnsembleError as exc:
            self.num_refused += 1
            if len(self.refused) < NUM_REFUSED_SHOWN:
                self.refused.append(f"{row.custom_id!r}: {error_object(exc)[1]['message']}")
            return
        if tokens is not None:
            self.num_counted += 1
            self.num_tokens += tokens
            self.longest = max(self.longest, tokens)


def num_prompt_tokens(row: Row, hosting: Hosting) -> int | None:
    """Tokens of a row's prompt; None if nobody here reads it. Raises what the row would be refused with."""
    terms = Terms("", 0, lambda: "")
    match row.url:
        case "/v1/chat/completions":
            chat = row_body(ChatBody, row)
            model = requested_model(hosting, chat.model)
            tools = asked_tools(chat, hosting, model.name)
            thoughts = asked_thoughts(chat, hosting, model.name)
            thoughts.check()
            requests = [chat_request(chat, hosting, model_name=model.name, tools=tools, thoughts=thoughts, terms=terms)]
        case "/v1/completions":
            completion = row_body(CompletionBody, row)
            model = requested_model(hosting, completion.model)
            requests = completion_requests(completion, hosting, model_name=model.name, terms=terms)
        case _:
            return None
    surface = hosting.surface(model.name)
    if surface is None:
        return None
    lengths = []
    for request in requests:
        if request.messages is not None:
            told = request.told_template
            length = len(surface.render(request.messages, tools=request.tools, template_kwargs=told))
        else:
            prompt = request.prompt
            length = len(surface.encode(prompt) if isinstance(prompt, str) else prompt or ())
        lengths.append(_fitted(length, request, model.max_model_len))
    return sum(lengths)


def _fitted(length: int, request: GenerationRequest, max_model_len: int | None) -> int:
    """The tokens that are read of a prompt of this length. Raises `ContextLengthError` if it leaves no room."""
    if request.truncate_prompt_tokens is not None:
        return min(length, request.truncate_prompt_tokens)
    wanted = length + (request.sampling.max_tokens or 1)
    if max_model_len is not None and wanted > max_model_len:
        raise ContextLengthError(
            f"the prompt has {length} tokens and {wanted - length} are to be written; the model's context is "
            f"{max_model_len}",
            param="messages" if request.messages is not None else "prompt",
        )
    return length


@dataclass(frozen=True)
class Probe:
    """What a few rows of a job took. `errors`: messages of those that failed."""

    results: Sequence[RowResult]
    elapsed_s: float

    @property
    def errors(self) -> list[str]:
        return [result.body["error"]["message"] for result in self.results if not result.is_ok]

    @property
    def completion_tokens(self) -> list[int]:
        """Of each row that was answered."""
        return [result.body.get("usage", {}).get("completion_tokens", 0) for result in self.results if result.is_ok]


async def probe(rows: Sequence[Row], hosting: Hosting, *, seed: int) -> Probe:
    """Answer these rows side by side, as the job would; their answers are not kept."""
    start = time.perf_counter()
    results = await asyncio.gather(*(answer(hosting, seeded(row, seed)) for row in rows))
    return Probe(results, time.perf_counter() - start)


@dataclass(frozen=True)
class Estimate:
    """For a whole job. `completion_error`: standard error of `completion_tokens`; None after a single row.

    `members`: tokens and cost of each single model.
    """

    completion_tokens: float
    completion_error: float | None
    elapsed_s: float
    members: Mapping[str, MemberUsage]

    @staticmethod
    def of(probe: Probe, num_rows: int) -> Estimate | None:
        """None if no row of the probe was answered."""
        written = probe.completion_tokens
        if not written:
            return None
        error = num_rows * statistics.stdev(written) / math.sqrt(len(written)) if len(written) > 1 else None
        share = num_rows / len(written)
        members: dict[str, MemberUsage] = {}
        for result in probe.results:
            for name, used in result.usage.items():
                members[name] = members.get(name, MemberUsage()) + used
        scaled = {
            name: MemberUsage(
                round(share * used.prompt_tokens), round(share * used.completion_tokens), share * used.cost
            )
            for name, used in members.items()
        }
        return Estimate(num_rows * statistics.mean(written), error, share * probe.elapsed_s, scaled)


def evenly_chosen(rows: Iterable[Row | BadRow], num_rows: int, num_chosen: int) -> list[Row]:
    """About `num_chosen` rows from all over the job; those that cannot be run give way to the next that can."""
    chosen: list[Row] = []
    for place, row in enumerate(rows):
        if len(chosen) < num_chosen and isinstance(row, Row) and place >= len(chosen) * num_rows // num_chosen:
            chosen.append(row)
    return chosen
