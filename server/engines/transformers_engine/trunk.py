"""What one member has read of one text, and how it reads another way to spell it.

Its cache, the *trunk*, holds the history that was forwarded last. Another one rewinds it to what both have in common
and adds the rest, a token mostly. Where several are wanted at once, the others stand on copies of the trunk's
beginning that are dropped after the step: not on shared segments, which would send the whole batch through attention in
parts. Copies are a matter of speed: for those for which there is no memory the trunk is rewound, one step after the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ensemble_server.ensembles.spelling.lattice import History
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member


class Trunk:
    """`cache` has read the tokens `begin`, which every history follows, and behind them the steps `held` of one."""

    def __init__(self, member: Member, cache: RowCache, begin: Sequence[int], held: Sequence[History] = ()) -> None:
        self.cache = cache
        self._member = member
        self._begin = list(begin)
        self._held = list(held)

    def fork(self) -> Trunk:
        """Another one that continues from here, on what this one has read."""
        return Trunk(self._member, self.cache.fork(), self._begin, self._held)

    def num_tokens(self, history: History) -> int:
        """How many a row has that holds it, from the prompt's first on."""
        return len(self._begin) + history.length

    def num_next(self, history: History) -> int:
        """By how many tokens of its own the trunk grows if it is rewound to hold `history`."""
        return self._num_more(self._path(history)[0], self.num_tokens(history))

    def num_next_anew(self, token_ids: Sequence[int]) -> int:
        """The same for `anew`."""
        return self._num_more(self._num_alike(token_ids), len(token_ids))

    def rewound(self, history: History) -> Span:
        """A row for `history` on the trunk itself."""
        num_common, steps = self._path(history)
        self.cache.truncate(num_common)
        self._held[num_common - len(self._begin) :] = steps
        return self._span(self.cache, steps)

    def nearest(self, histories: Sequence[History]) -> History:
        """The one for which least is to be read."""
        return min(histories, key=lambda history: len(self._path(history)[1]))

    def branches(self, histories: Sequence[History], spare: Spare) -> list[Span]:
        """Rows on copies, for the first ones of `histories`, as far as there is memory."""
        spans = []
        for num_common, steps in map(self._path, histories):
            num_own = max(0, num_common - self.cache.num_shared) + len(steps)
            if not spare.lends(num_own * self._member.backbone.kv_bytes_per_token):
                break
            spans.append(self._span(self.cache.copy_to(num_common, len(steps)), steps))
        return spans

    def anew(self, token_ids: Sequence[int]) -> Span:
        """A row for another reading of the whole text, the prompt included, which histories follow from now on."""
        num_common = self._num_alike(token_ids)
        self.cache.truncate(num_common)
        self._begin, self._held = list(token_ids), []
        return Span(self.cache, self._begin[num_common:], 1, self._member.adapter)

    def _num_more(self, num_common: int, num_tokens: int) -> int:
        num_own = num_tokens - min(num_common, self.cache.num_shared)
        return num_own - (self.cache.length - self.cache.num_shared)

    def _num_alike(self, token_ids: Sequence[int]) -> int:
        """How many tokens the trunk has in common with `token_ids`, of which the last is read in any case."""
        known = [*self._begin, *(step.token_id for step in self._held)]
        pairs = zip(known, token_ids[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _path(self, history: History) -> tuple[int, list[History]]:
        """How many tokens of the trunk lead to `history`, and the steps behind them, at least the last."""
        path = [history]
        step = history.parent
        while step is not None and not (step.length <= len(self._held) and self._held[step.length - 1] is step):
            path.append(step)
            step = step.parent
        return len(self._begin) + (0 if step is None else step.length), path[::-1]

    def _span(self, cache: RowCache, steps: Sequence[History]) -> Span:
        return Span(cache, [step.token_id for step in steps], 1, self._member.adapter)
