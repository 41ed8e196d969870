"""Alternatives to the tokens of a text that is there already, for members of different vocabularies.

Lattices are led along the text byte by byte, as if it was written, and look ahead wherever a token of the first member
begins (`byte_lookahead`). So a text takes as many steps as an answer of its length; what is only scored is read in
chunks (`given_reading`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ensemble_server.ensembles.base import Mixture, TokenLogprob
from ensemble_server.ensembles.pooling import effective_weights, following
from ensemble_server.ensembles.spelling import utf8
from ensemble_server.ensembles.spelling.lattice import History
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.byte_lookahead import Lookahead, Scored, told
from ensemble_server.server.engines.transformers_engine.byte_pool import BytePool
from ensemble_server.server.engines.transformers_engine.given_reading import MemberReading
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.speller import Speller, branched, received
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary


class GivenAlternatives:
    """`readings`: how each member reads `text`; `pieces`: the first member's tokens of it, scored, the first of which
    may have no log-probability; `num`: alternatives to each of the others.

    From where a member's lattice cannot write the text any more, pieces have no alternatives.
    """

    def __init__(
        self,
        members: Sequence[Member],
        readings: Sequence[MemberReading],
        text: bytes,
        pieces: Sequence[TokenLogprob],
        mixture: Mixture,
        num: int,
    ) -> None:
        prior = effective_weights(list(mixture.weights.values()))
        self._members = members
        self._readings = readings
        self._text = text
        self._num = num
        self._pool = BytePool(mixture, prior, following.start(prior, mixture.share))
        self._caches = [RowCache() for _ in members]
        self._spellers: list[Speller] = []
        self._ahead: Lookahead | None = None
        self._wanted: list[tuple[int, History]] = []  # by it, in this step
        self._num_asked: list[int] = []  # rows of each member in this step
        self.pieces = list(pieces)
        begins = [0]
        for piece in pieces:
            begins.append(begins[-1] + len(piece.bytes))
        self._left = [(begins[i], i) for i, piece in enumerate(pieces) if piece.logprob is not None]
        self._place = self._left[0][0] if self._left else 0  # up to which the text has come
        self._state = utf8.state_after(text[: self._place])
        self._is_fed = False  # whether the byte before `_place` has not moved the weights yet

    @property
    def is_done(self) -> bool:
        return not self._left

    @property
    def caches(self) -> Iterator[RowCache]:
        return iter([speller.cache for speller in self._spellers] or self._caches)

    def next_spans(self, spare: Spare) -> list[tuple[Member, Span]]:
        """What lattices want, or copies of them that look ahead. `spare`: for rows beside the members' own."""
        self._wanted = []
        if not self._spellers:
            rows = zip(self._members, self._readings, self._caches, strict=True)
            spans = [[Span(cache, list(head), 1, member.adapter)] for member, (head, _), cache in rows]
        elif self._ahead is not None and self._ahead.is_waiting:
            spans, self._wanted = branched(self._spellers, self._ahead.wanted, spare)
        else:
            spans = [speller.next_spans(spare) for speller in self._spellers]
        self._num_asked = list(map(len, spans))
        return [(member, span) for member, own in zip(self._members, spans, strict=True) for span in own]

    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """The results of `next_spans`: (1, V) each. Raises `MemberError` for NaN."""
        if not self._spellers:
            self._spellers = [self._speller(k, row[0]) for k, row in enumerate(rows)]
            self._go_on()
            return
        distributions = received(self._spellers, rows, self._num_asked, is_branched=bool(self._wanted))
        if self._ahead is not None:
            for (k, history), distribution in zip(self._wanted, distributions, strict=True):
                self._ahead.give(k, history, distribution)
            self._bound(self._ahead)
        self._go_on()

    def _speller(self, k: int, logprobs: torch.Tensor) -> Speller:
        member, (head, path) = self._members[k], self._readings[k]
        vocabulary = spelled_vocabulary(member)
        begins_at = len(self._text) - sum(len(vocabulary.token_bytes[token_id]) for token_id in path)
        return Speller(member, vocabulary, head, self._caches[k], logprobs, begins_at=begins_at)

    def _go_on(self) -> None:
        """As far as no forward is wanted."""
        while self._left and not self._is_waiting():
            if any(speller.is_lost for speller in self._spellers):
                self._left = []
            elif behind := [speller for speller in self._spellers if speller.position < self._place]:
                for speller in behind:
                    speller.feed(self._text[speller.position])
            elif self._is_fed:
                self._is_fed = False
                self._pool = self._pool.after([speller.evidence for speller in self._spellers])
            elif self._place < self._left[0][0]:
                self._state = int(utf8.NEXT[self._state, self._text[self._place]])
                self._place, self._is_fed = self._place + 1, True
            elif self._ahead is None:
                self._look_ahead()
            else:
                self._tell(self._ahead, self._left.pop(0)[1])
                self._ahead = None

    def _is_waiting(self) -> bool:
        return any(speller.is_waiting for speller in self._spellers) or (
            self._ahead is not None and self._ahead.is_waiting
        )

    def _look_ahead(self) -> None:
        lattices = [speller.lattice for speller in self._spellers]
        vocabulary = self._spellers[0].vocabulary
        self._ahead = Lookahead(lattices, self._pool, vocabulary, self._state, num_top=self._num)
        self._bound(self._ahead)

    def _bound(self, ahead: Lookahead) -> None:
        """Nobody looks farther ahead than a member can read."""
        if not all(self._spellers[k].has_room_for(history) for k, history in ahead.wanted):
            ahead.stop()

    def _tell(self, ahead: Lookahead, index: int) -> None:
        piece = self.pieces[index]
        assert piece.logprob is not None, "only such pieces are looked at"
        chosen = Scored(piece.bytes, piece.logprob, ())
        vocabulary, surface = self._spellers[0].vocabulary, self._members[0].surface
        top = told(ahead.listed(chosen, self._num), chosen, piece.token_id, vocabulary, surface)
        self.pieces[index] = replace(piece, top=top)
