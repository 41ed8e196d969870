"""One member that writes by bytes: its lattice, and the trunk under it, on which its rows stand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ensemble_server.ensembles.errors import MemberError
from ensemble_server.ensembles.spelling import ROW
from ensemble_server.ensembles.spelling.byte_order import Distribution
from ensemble_server.ensembles.spelling.lattice import EPSILON, History, Lattice
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.trunk import Trunk
from ensemble_server.server.weights.spelled_vocabulary import SpelledVocabulary

MAX_ROWS = 8  # of one member in one step


def by_speller(wanted: Iterable[tuple[int, History]], num_spellers: int) -> list[list[History]]:
    """Histories that copies of lattices want, of each speller, by its place."""
    histories: list[list[History]] = [[] for _ in range(num_spellers)]
    for k, history in wanted:
        histories[k].append(history)
    return histories


def branched(
    spellers: Sequence[Speller], wanted: Sequence[tuple[int, History]], spare: Spare
) -> tuple[list[list[Span]], list[tuple[int, History]]]:
    """Rows for histories that copies of lattices want, of the spellers at these places: as many as there is memory for,
    one in any case. -> per speller, and for whom they are, in their order."""
    histories = by_speller(wanted, len(spellers))
    spans = [speller.branches(own, spare) for speller, own in zip(spellers, histories, strict=True)]
    asked = [(k, history) for k, own in enumerate(spans) for history in histories[k][: len(own)]]
    if not asked:
        k = min(k for k, _ in wanted)
        history, span = spellers[k].rewound(histories[k])
        spans[k], asked = [span], [(k, history)]
    return spans, asked


def received(
    spellers: Sequence[Speller], rows: Sequence[torch.Tensor], num_asked: Sequence[int], *, is_branched: bool
) -> list[Distribution]:
    """Give each speller its `num_asked` of `rows`, (1, V) each; those that copies asked for are returned instead, in
    `branched`'s order."""
    begin, distributions = 0, []
    for speller, num in zip(spellers, num_asked, strict=True):
        of_member = rows[begin : begin + num]
        if not is_branched:
            speller.take(of_member)
        elif of_member:
            distributions += speller.distributions(of_member)
        begin += num
    return distributions


class Speller:
    """`begin`: the tokens that `cache` has read, and that every history follows; `logprobs`: (V,), what comes next.

    `begins_at`: the byte of the choice's text where they end; negative where the lattice is given the end of a prompt.
    """

    def __init__(
        self,
        member: Member,
        vocabulary: SpelledVocabulary,
        begin: Sequence[int],
        cache: RowCache,
        logprobs: torch.Tensor,
        *,
        begins_at: int = 0,
        epsilon: float = EPSILON,
    ) -> None:
        self.member = member
        self.num_restarts = 0
        self._num_untold = 0  # of the restarts
        self.num_rows = 0  # forwarded for this choice
        self.num_tokens = 0
        self.begins_at = begins_at
        self.vocabulary = vocabulary
        self.lattice: Lattice | None = Lattice(vocabulary.order.distributions(logprobs[None])[0], epsilon=epsilon)
        self._epsilon = epsilon
        self._trunk = Trunk(member, cache, begin)
        self._restart: list[int] | None = None  # the reading of the whole text that the lattice begins from anew
        self._asked: list[History] = []
        self._has_just_begun = False  # anew: it could not write the last byte

    def fork(self) -> Speller:
        """Another one that continues from here, on what this one has read."""
        assert not self.is_waiting, "a member that waits for distributions cannot be copied"
        twin = copy.copy(self)
        twin.lattice = self.lattice.fork() if self.lattice is not None else None
        twin._trunk = self._trunk.fork()
        twin.num_rows = twin.num_tokens = twin.num_restarts = twin._num_untold = 0
        return twin

    @property
    def is_waiting(self) -> bool:
        """Whether it wants a forward before the text can go on."""
        return self._restart is not None or (self.lattice is not None and bool(self.lattice.wanted))

    @property
    def is_lost(self) -> bool:
        """Whether it cannot write the text, and has not begun anew yet."""
        return self.lattice is None

    @property
    def position(self) -> int:
        """The byte of the choice's text where it stands."""
        return self.begins_at + (self.lattice.position if self.lattice is not None else 0)

    @property
    def cache(self) -> RowCache:
        return self._trunk.cache

    @property
    def num_read(self) -> int:
        """How many tokens the longest history that is wanted has, from the prompt's first on."""
        if self._restart is not None:
            return len(self._restart)
        wanted = self.lattice.wanted if self.lattice is not None else []
        return max(map(self._trunk.num_tokens, wanted), default=0)

    def num_next(self, looked_at: Sequence[History]) -> int:
        """By how many tokens its cache may grow in the next step. `looked_at`: by copies of its lattice."""
        if self._restart is not None:
            return self._trunk.num_next_anew(self._restart)
        wanted = self.lattice.wanted if self.lattice is not None else []
        return max(map(self._trunk.num_next, [*wanted, *looked_at]), default=1)

    def feed(self, byte: int) -> None:
        """The text goes on with `byte`."""
        self._has_just_begun = False
        if self.lattice is None:
            return
        self.lattice.feed(byte)
        self._check_alive()

    def restart(self, token_ids: Sequence[int], position: int) -> None:
        """Begin anew after `token_ids`, this member's own reading of prompt and text up to byte `position`."""
        self._restart, self.begins_at = list(token_ids), position
        self.num_restarts += 1
        self._num_untold += 1

    def drain_restarts(self) -> int:
        """How often it began anew since this was asked last."""
        num, self._num_untold = self._num_untold, 0
        return num

    def row(self, *, spreads: bool) -> np.ndarray:
        """(257,) float64: log-probabilities of what comes next; all -inf for a member that is lost. `spreads`: see
        `Lattice.row`."""
        return np.full(ROW, -np.inf) if self.lattice is None else self.lattice.row(spreads=spreads)

    @property
    def evidence(self) -> float:
        """log p of the last byte; -inf if it could not be written."""
        return -np.inf if self.lattice is None or self._has_just_begun else self.lattice.evidence

    def next_spans(self, spare: Spare) -> list[Span]:
        """What is forwarded for it in the next step: up to `MAX_ROWS` rows, one of them in any case. `spare`: for the
        others."""
        if self._restart is not None:
            return self._counted([self._trunk.anew(self._restart)])
        if self.lattice is None or not self.lattice.wanted:
            return []
        first, *others = self.lattice.wanted[:MAX_ROWS]
        spans = self._trunk.branches(others, spare)
        self._asked = [first, *others[: len(spans)]]
        return self._counted([self._trunk.rewound(first), *spans])

    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """The results of the spans just forwarded, in their order: (1, V) each. Raises `MemberError` for NaN."""
        if not rows:
            return
        distributions = self.distributions(rows)
        if self._restart is not None:
            self._restart, self._has_just_begun = None, True
            self.lattice = Lattice(distributions[0], epsilon=self._epsilon)
            return
        assert self.lattice is not None, "only a lattice asks for rows"
        for history, distribution in zip(self._asked, distributions, strict=True):
            self.lattice.give(history, distribution)
        self._check_alive()

    def branches(self, histories: Sequence[History], spare: Spare) -> list[Span]:
        """Rows for the first ones of `histories`, of copies of its lattice, as far as there is memory for them."""
        return self._counted(self._trunk.branches(histories[:MAX_ROWS], spare))

    def rewound(self, histories: Sequence[History]) -> tuple[History, Span]:
        """One of them, and a row for it where its own are: it reads back what it needs of that when it goes on."""
        history = self._trunk.nearest(histories)
        return history, self._counted([self._trunk.rewound(history)])[0]

    def distributions(self, rows: Sequence[torch.Tensor]) -> list[Distribution]:
        """Of the results of spans, (1, V) each, at least one. Raises `MemberError` for NaN."""
        logprobs = torch.stack([row[0] for row in rows])
        if logprobs[:, 0].isnan().any():
            raise MemberError(self.member.name, "its output is not a number (NaN); its weights may be damaged")
        return self.vocabulary.order.distributions(logprobs)

    def has_room_for(self, history: History) -> bool:
        """Whether the member can read that far."""
        return self._trunk.num_tokens(history) <= self.member.max_model_len

    def _counted(self, spans: list[Span]) -> list[Span]:
        self.num_rows += len(spans)
        self.num_tokens += sum(len(span.token_ids) for span in spans)
        return spans

    def _check_alive(self) -> None:
        if self.lattice is not None and self.lattice.is_dead:
            self.begins_at += self.lattice.position
            self.lattice = None
