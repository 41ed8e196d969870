"""A text that members read only to be judged by it: whoever asked sees every distribution once, while it is there.

Whole distributions are large (25 MB for 128 tokens and a vocabulary of 49k, per member), so none are kept: each chunk
of the text is shown to a function and dropped. That function may pool them in as many ways as it likes; the members
are run once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import torch

from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.job import Job
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare, prompt_bytes
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey
from ensemble_server.server.engines.transformers_engine.prompt import SCORED_CHUNK

Visitor = Callable[[torch.Tensor, torch.Tensor], None]  # (logprobs (K, t, V) float32, targets (t,) int64)


class Visit(Job):
    """Reads `token_ids` but for the last, which predicts nothing. Its one event is None, when all has been shown."""

    def __init__(
        self,
        members: Sequence[Member],
        token_ids: Sequence[int],
        visit: Visitor,
        loop: asyncio.AbstractEventLoop,
        *,
        priority: int,
    ) -> None:
        super().__init__(members, loop, priority=priority)
        self._token_ids = token_ids
        self._visit = visit
        self._caches: list[RowCache] = []

    @property
    def num_places(self) -> int:
        return 1

    @property
    def is_reading(self) -> bool:
        return self._num_read < len(self._token_ids) - 1

    @property
    def _num_read(self) -> int:
        return self._caches[0].length

    @property
    def caches(self) -> Iterator[RowCache]:
        return iter(self._caches)

    @property
    def kv_reserved(self) -> int:
        return sum(prompt_bytes(member, len(self._token_ids)) for member in self.members)

    @property
    def kv_left(self) -> int:
        return 0

    def begin(self) -> None:
        self._caches = [RowCache() for _ in self.members]

    def next_spans(self, budget: int, being_read: dict[BlockKey, bool], spare: Spare) -> list[tuple[Member, Span]]:
        num_tokens = min(SCORED_CHUNK, max(1, budget // len(self.members)))
        chunk = self._token_ids[self._num_read : -1][:num_tokens]
        return [
            (member, Span(cache, chunk, len(chunk), member.adapter))
            for member, cache in zip(self.members, self._caches, strict=True)
        ]

    @torch.inference_mode()
    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """Show the chunk. What the visitor raises is this job's error, as it is."""
        for member, own in zip(self.members, rows, strict=True):
            if own.isnan().any():
                raise MemberError(member.name, "its output is not a number (NaN); its weights may be damaged")
        device = rows[0].device
        num_new = len(rows[0])
        end = self._num_read + 1
        targets = torch.tensor(self._token_ids[end - num_new : end], dtype=torch.long, device=device)
        try:
            self._visit(torch.stack([own.to(device) for own in rows]), targets)
        except Exception as exc:
            self.fail(exc)
            return
        if not self.is_reading:
            self.outbox.append(None)
            self.is_finished = True
