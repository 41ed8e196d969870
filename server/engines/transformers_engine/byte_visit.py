"""A text that members of different vocabularies read only to be judged by it, byte by byte: the twin of `visit`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import torch

from ensemble_server.ensembles.spelling.given_text import Watch
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.given_reading import GivenReading, MemberReading
from ensemble_server.server.engines.transformers_engine.job import Job
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare, prompt_bytes
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey
from ensemble_server.server.engines.transformers_engine.visit import Visitor


class ByteVisit(Job):
    """`visit` is shown all of the text at once, when it is read: rows of 257 and the bytes that came. `watches`: of
    each member, who is told of its own distributions meanwhile."""

    def __init__(
        self,
        members: Sequence[Member],
        readings: Sequence[MemberReading],
        text: bytes,
        visit: Visitor,
        loop: asyncio.AbstractEventLoop,
        *,
        priority: int,
        watches: Sequence[Watch] | None = None,
    ) -> None:
        super().__init__(members, loop, priority=priority)
        self._watches = watches
        self._readings = readings
        self._text = text
        self._visit = visit
        self._reading: GivenReading | None = None

    @property
    def num_places(self) -> int:
        return 1

    @property
    def is_reading(self) -> bool:
        return self._reading is None or not self._reading.is_done

    @property
    def caches(self) -> Iterator[RowCache]:
        return iter(()) if self._reading is None else self._reading.caches

    @property
    def kv_reserved(self) -> int:
        readings = zip(self.members, self._readings, strict=True)
        return sum(prompt_bytes(member, len(head) + len(path)) for member, (head, path) in readings)

    @property
    def kv_left(self) -> int:
        return 0

    def begin(self) -> None:
        self._reading = GivenReading(self.members, self._readings, self._text, self._watches)

    def next_spans(self, budget: int, being_read: dict[BlockKey, bool], spare: Spare) -> list[tuple[Member, Span]]:
        assert self._reading is not None, "it has begun"
        return self._reading.next_spans(budget, spare)

    @torch.inference_mode()
    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """What the visitor raises is this job's error, as it is."""
        assert self._reading is not None, "it has begun"
        self._reading.take(rows)
        if not self._reading.is_done:
            return
        judged = self._reading.judgement()
        try:
            if len(judged.targets):
                self._visit(torch.from_numpy(judged.rows), torch.from_numpy(judged.targets))
        except Exception as exc:
            self.fail(exc)
            return
        self.outbox.append(None)
        self.is_finished = True
