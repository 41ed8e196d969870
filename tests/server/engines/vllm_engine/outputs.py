"""What vLLM's streams yield, made by hand: only what the engine reads of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any


def logprob(value: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(logprob=value, rank=rank)


def completion(
    token_ids: Sequence[int],
    *,
    finish_reason: str | None = None,
    logprobs: Sequence[Mapping[int, SimpleNamespace]] | None = None,
) -> SimpleNamespace:
    return SimpleNamespace(token_ids=list(token_ids), finish_reason=finish_reason, logprobs=logprobs)


def output(token_ids: Sequence[int], *, prompt_logprobs: Any = None, **changes: Any) -> SimpleNamespace:
    one = completion(token_ids, **changes)
    finished = one.finish_reason is not None
    return SimpleNamespace(outputs=[one], prompt_logprobs=prompt_logprobs, finished=finished, metrics=None)


class Streams:
    """Opens streams that yield `outputs[index]`; `closed` are those that were closed before their end."""

    def __init__(self, *outputs: Sequence[SimpleNamespace | Exception | float]) -> None:
        """A number is a pause in seconds."""
        self._outputs = outputs
        self.opened: list[int] = []
        self.closed: list[int] = []

    def __call__(self, index: int) -> AsyncGenerator[SimpleNamespace, None]:
        self.opened.append(index)
        return self._stream(index)

    async def _stream(self, index: int) -> AsyncGenerator[SimpleNamespace, None]:
        import asyncio

        is_over = False
        try:
            for item in self._outputs[index]:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                    continue
                await asyncio.sleep(0)
                yield item
            is_over = True
        finally:
            if not is_over:
                self.closed.append(index)
