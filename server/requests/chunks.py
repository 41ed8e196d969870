"""The chunks of a streamed answer: what chats and completions share.

    [role] → deltas → finish of each choice → usage, if asked for

`finish_reason` and, where usage was asked for, `usage` are null until they are known. The `ensemble` object is on the
last chunk: the usage chunk, or else the last choice's finish.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from ensemble_server.ensembles.base import Delta, PromptScored
from ensemble_server.server.requests.generation import Generations
from ensemble_server.server.requests.protocol import StreamOptions

Part = dict[str, Any]  # what one chunk has besides its head: {"choices": [choice]}, and more on some


class ChunkWriter(Protocol):
    """Turns events into parts of chunks. A finish is a part of its own or the last of its event's parts."""

    def parts(self, place: int, event: PromptScored | Delta) -> Iterable[Part]: ...


async def streamed(
    generations: Generations, head: dict[str, Any], writer: ChunkWriter, options: StreamOptions | None
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a whole stream."""
    continuous = bool(options and options.continuous_usage_stats)
    has_usage = bool(options and options.include_usage) or continuous

    def chunk(part: Part) -> dict[str, Any]:
        usage = {"usage": generations.usage_so_far if continuous else None} if has_usage else {}
        return {**head, **part, **usage}

    finish: dict[str, Any] | None = None  # the latest finish, held until it is known whether it is the last chunk
    async with aclosing(generations.events()) as events:
        async for place, item in events:
            for part in writer.parts(place, item):
                if finish is not None:
                    yield finish
                    finish = None
                made = chunk(part)
                if part["choices"][0]["finish_reason"] is None:
                    yield made
                else:
                    finish = made
    assert finish is not None, f"model {generations.model.name!r} ended without a finish_reason"

    if has_usage:
        yield finish
        yield {**head, "choices": [], "usage": generations.usage, "ensemble": generations.ensemble}
    else:
        yield {**finish, "ensemble": generations.ensemble}
