"""One request on vLLM, from its prompt to its last event: a vLLM request per choice, side by side.

vLLM's own `n` is not used: it refuses greedy choices and ends them together, while a stop string ends one alone. The
choices read the prompt once all the same, if the prefix cache is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    MemberUsage,
    Mixture,
    PromptScored,
    Usage,
)
from ensemble_server.ensembles.errors import DeadlineError
from ensemble_server.server.engines.vllm_engine.choice import VllmChoice, describe_prompt
from ensemble_server.server.engines.vllm_engine.views import MemberView

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

OpenStream = Callable[[int], AsyncGenerator["RequestOutput", None]]


@dataclass(frozen=True)
class Prepared:
    """A request that has been read and found to be servable. `max_new_tokens` 0: the prompt is only scored."""

    request: GenerationRequest
    mixture: Mixture
    views: Sequence[MemberView]
    token_ids: list[int]
    max_new_tokens: int
    method: str

    @property
    def vocab_size(self) -> int:
        return self.views[0].vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset().union(*(view.eos_ids for view in self.views))

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
        )

    def done(self, num_generated: int) -> Done:
        members = tuple(self.mixture.weights)
        used = MemberUsage(len(self.token_ids), num_generated)
        usage = Usage(len(self.token_ids), num_generated, dict.fromkeys(members, used))
        return Done(usage, self.method, members, len(members))

    def prompt_scored(self, output: RequestOutput) -> PromptScored:
        num_top = self.request.prompt_logprobs
        if num_top is None:
            return PromptScored(tuple(self.token_ids))
        tokens = describe_prompt(self.views[0].surface, self.token_ids, output.prompt_logprobs, num_top)
        return PromptScored(tuple(self.token_ids), tokens)


async def generate(prepared: Prepared, open_stream: OpenStream, on_begin: Callable[[], None]) -> AsyncIterator[Event]:
    """The events of a request. `open_stream`: the vLLM stream of choice `index`. `on_begin` is called when the prompt
    has been read. Raises what vLLM raises, and `DeadlineError` if not even that happened in time.
    """
    request = prepared.request
    choices = [prepared.choice(index) for index in range(request.n if prepared.max_new_tokens else 1)]
    deadline = None if request.deadline_s is None else asyncio.get_running_loop().time() + request.deadline_s
    held: list[tuple[int, RequestOutput]] = []  # came before the choice that brings the prompt's scores
    has_begun = False
    try:
        async with aclosing(_side_by_side(choices, open_stream, deadline)) as outputs:
            async for index, output in outputs:
                if not has_begun:
                    if index and request.prompt_logprobs is not None:
                        held.append((index, output))
                        continue
                    has_begun = True
                    on_begin()
                    yield prepared.prompt_scored(output)
                    if not prepared.max_new_tokens:
                        break
                for place, ready in ((index, output), *held):
                    if (delta := choices[place].read(ready.outputs[0])) is not None:
                        yield delta
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
    yield prepared.done(sum(choice.num_generated for choice in choices))


async def _side_by_side(
    choices: Sequence[VllmChoice], open_stream: OpenStream, deadline: float | None
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """(index, output) of all choices' streams as they come; a stream is closed, which frees its place in vLLM, when its
    choice is finished. Raises the first error of a stream, and `TimeoutError` when the event loop's time is `deadline`.
    """
    if len(choices) == 1:
        async with aclosing(open_stream(0)) as stream:
            while True:
                async with asyncio.timeout_at(deadline):
                    output = await anext(stream, None)
                if output is None:
                    return
                yield 0, output
                if choices[0].is_finished and not output.finished:
                    return

    arrived: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        async with aclosing(open_stream(index)) as stream:
            async for output in stream:
                arrived.put_nowait((index, output))

    def ended(index: int, task: asyncio.Task[None]) -> None:
        arrived.put_nowait((index, None if task.cancelled() else task.exception()))

    tasks = []
    try:
        for index in range(len(choices)):
            tasks.append(asyncio.create_task(pump(index)))
            tasks[-1].add_done_callback(partial(ended, index))
        num_live = len(tasks)
        while num_live:
            async with asyncio.timeout_at(deadline):
                index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_live -= 1
            else:
                yield index, item
                if choices[index].is_finished and not item.finished:
                    tasks[index].cancel()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
