"""Members of one choice that read its tokens late: many in one forward, when they are asked or have too many to read.

Reading n tokens at once takes little longer than reading one while a forward is bound by reading the weights. So it is
worth waiting for members with weights of their own. Those that stand on the main member's weights read each token in
its forward, which reads the weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member

MAX_LAG = 32  # tokens; forwards of more are bound by arithmetic on a CPU, and hold up everybody's step


class LaggingMembers:
    """`indices`: those of `members` that lag behind member `main`; not empty. `is_judged`: whether what they expected
    of tokens counts (a posterior pool), so that it is kept for every token and not only for the next."""

    def __init__(self, members: Sequence[Member], caches: Sequence[RowCache], main: int, *, is_judged: bool) -> None:
        self.indices = lagging(members, main)
        self._members = members
        self._caches = caches
        self._is_judged = is_judged
        self._token_ids: list[int] = []  # that they have not read
        self._said: list[np.ndarray | None] = []  # (K,) nats of each by those who had read up to it; None: not judged

    @property
    def num_unread(self) -> int:
        return len(self._token_ids)

    @property
    def is_due(self) -> bool:
        """Whether they have to read on, asked or not."""
        return self.num_unread >= MAX_LAG

    def add(self, token_id: int, said: np.ndarray | None) -> None:
        """The next token of the text. said: (K,) nats that members gave it, of these members anything; None if it was
        judged by all of them already, or is not to be judged."""
        self._token_ids.append(token_id)
        self._said.append(said)

    def next_spans(self) -> list[tuple[Member, Span]]:
        """All that they have not read, for each of them."""
        spans = []
        for k in self.indices:
            member = self._members[k]
            ids = member.surface.own_ids(self._token_ids)
            spans.append((member, Span(self._caches[k], ids, len(ids) if self._is_judged else 1, member.adapter)))
        return spans

    def take(self, rows: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """They have read `next_spans`. rows: what came of it. -> (K,) nats of every token that was waiting for them."""
        evidence = []
        if self._is_judged:
            ends = [self._ends(k) for k in self.indices]
            for place, said in enumerate(self._said[1:], start=1):
                if said is not None:
                    gained = said.copy()
                    for k, read, end in zip(self.indices, rows, ends, strict=True):
                        gained[k] = float(read[end[place - 1], self._token_ids[place]])
                    evidence.append(gained)
        self._token_ids, self._said = [], []
        return evidence

    def _ends(self, k: int) -> np.ndarray:
        """For each unread token, the place of the last of those that member `k` reads for it."""
        surface = self._members[k].surface
        return np.cumsum([len(surface.own_ids((token_id,))) for token_id in self._token_ids]) - 1


def lagging(members: Sequence[Member], main: int) -> tuple[int, ...]:
    """The places of those that stand on other weights than member `main`."""
    return tuple(k for k, member in enumerate(members) if member.backbone is not members[main].backbone)
