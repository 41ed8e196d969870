"""One request on vLLM, from its prompt to its last event: a vLLM request per choice, side by side.

vLLM's own `n` is not used: it refuses greedy choices and ends them together, while a stop string ends one alone. The
choices read the prompt once all the same, if the prefix cache is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, Mixture, PromptScored
from ensemble_server.ensembles.errors import DeadlineError
from ensemble_server.server.engines.shared import usage
from ensemble_server.server.engines.shared.reading import Reading
from ensemble_server.server.engines.shared.side_by_side import side_by_side
from ensemble_server.server.engines.shared.thoughts import max_thought_tokens
from ensemble_server.server.engines.vllm_engine.choice import VllmChoice, describe_prompt
from ensemble_server.server.weights.member_views import MemberView

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

OpenStream = Callable[[int], AsyncGenerator["RequestOutput", None]]


@dataclass(frozen=True)
class Prepared:
    """A request that has been read, by all members alike, and found to be servable."""

    request: GenerationRequest
    mixture: Mixture
    views: Sequence[MemberView]
    reading: Reading
    method: str

    @property
    def token_ids(self) -> list[int]:
        return self.reading.prompts[0]

    @property
    def max_new_tokens(self) -> int:
        return self.reading.max_new_tokens

    @property
    def vocab_size(self) -> int:
        return self.views[0].vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset().union(*(view.eos_ids for view in self.views))

    @property
    def max_thought_tokens(self) -> int | None:
        """As far as thoughts are told apart, in answers to conversations."""
        if self.request.messages is None or self.request.sampling.grammar is not None:
            return None
        return max_thought_tokens(self.request, self.views[0].surface)

    def choice(self, index: int) -> VllmChoice:
        names = list(self.mixture.weights)
        return VllmChoice(
            index,
            self.request,
            self.views[0].surface,
            member=names[0],
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids,
            explained_as=names[0] if self.request.explain and len(names) == 1 else None,
            prompt=self.token_ids,
        )

    def done(self, num_generated: int, num_reasoning: int) -> Done:
        num_read = dict.fromkeys(self.mixture.weights, len(self.token_ids))
        return usage.done(self.method, num_read, num_generated, num_reasoning)

    def prompt_scored(self, output: RequestOutput) -> PromptScored:
        num_top = self.request.prompt_logprobs
        waited_s = _waited_s(output)
        if num_top is None:
            return PromptScored(tuple(self.token_ids), waited_s=waited_s)
        tokens = describe_prompt(self.views[0].surface, self.token_ids, output.prompt_logprobs, num_top)
        return PromptScored(tuple(self.token_ids), tokens, waited_s)


def _waited_s(output: RequestOutput) -> float | None:
    """How long vLLM let the request wait for its first step; None where it keeps no count."""
    stats = output.metrics
    return stats.scheduled_ts - stats.queued_ts if stats is not None and stats.scheduled_ts else None


async def generate(prepared: Prepared, open_stream: OpenStream, on_begin: Callable[[], None]) -> AsyncGenerator[Event]:
    """The events of a request. `open_stream`: the vLLM stream of choice `index`. `on_begin` is called when the prompt
    has been read. Raises what vLLM raises, and `DeadlineError` if not even that happened in time.
    """
    request = prepared.request
    choices = [prepared.choice(index) for index in range(request.n if prepared.max_new_tokens else 1)]
    openers = [partial(_read, choice, partial(open_stream, index)) for index, choice in enumerate(choices)]
    deadline = None if request.deadline_s is None else asyncio.get_running_loop().time() + request.deadline_s
    held: list[Delta] = []  # came before the choice that brings the prompt's scores
    has_begun = False
    try:
        async with aclosing(side_by_side(openers, deadline=deadline)) as outputs:
            async for index, (output, delta) in outputs:
                if delta is not None and prepared.max_new_tokens:
                    held.append(delta)
                if not has_begun:
                    if index and request.prompt_logprobs is not None:
                        continue
                    has_begun = True
                    on_begin()
                    yield prepared.prompt_scored(output)
                    if not prepared.max_new_tokens:
                        break
                for ready in held:
                    yield ready
                held = []
    except TimeoutError as exc:
        if not has_begun:
            raise DeadlineError(f"no token was generated within {request.deadline_s:g} s") from exc
        for choice in choices:
            if not choice.is_finished:
                yield choice.expire()
    if not prepared.max_new_tokens:
        for index in range(request.n):
            yield Delta(index, finish_reason="length")
    written = choices if prepared.max_new_tokens else []
    yield prepared.done(
        sum(choice.num_generated for choice in written), sum(choice.num_reasoning for choice in written)
    )


async def _read(
    choice: VllmChoice, open_stream: Callable[[], AsyncGenerator[RequestOutput, None]]
) -> AsyncGenerator[tuple[RequestOutput, Delta | None], None]:
    """vLLM's outputs and what they show. The stream is closed, which frees its place in vLLM, when its choice is
    finished."""
    async with aclosing(open_stream()) as outputs:
        async for output in outputs:
            yield output, choice.read(output.outputs[0])
            if choice.is_finished and not output.finished:
                return
