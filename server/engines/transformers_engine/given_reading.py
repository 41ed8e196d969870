"""Members of different vocabularies read a text to be judged by it: what each expected at every byte.

Each reads its own tokens of the text, in chunks, then in waves the other ways to spell it that matter
(`ensembles.spelling.given_text`): rows that stand on copies of the beginning of what it has read, and are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemble_server.ensembles.base import Mixture, TokenLogprob
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.ensembles.pooling import effective_weights, following, pool
from ensemble_server.ensembles.spelling.byte_order import Distribution
from ensemble_server.ensembles.spelling.given_text import GivenText, Watch
from ensemble_server.ensembles.spelling.lattice import History
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.trunk import Trunk
from ensemble_server.server.weights.spelled_vocabulary import SpelledVocabulary, spelled_vocabulary

CHUNK = 64  # tokens of its own reading that a member reads at once, each with its whole distribution
WAVE = 16  # rows of one member in one step
SORTED_AT_ONCE = 8  # distributions: each is copied into the order of its tokens' bytes


@dataclass(frozen=True)
class Judgement:
    """What members expected of a text from byte `begin` on, before which not all of them expected anything.

    `rows`: (K, T - begin, 257) log-probabilities, in which those of the bytes that came are the evidence for them, and
    finite; `targets`: (T - begin,) int64, these bytes.
    """

    begin: int
    rows: np.ndarray
    targets: np.ndarray

    @property
    def evidence(self) -> np.ndarray:
        """(K, T - begin) nats"""
        return np.take_along_axis(self.rows, self.targets[None, :, None], axis=2)[..., 0]


MemberReading = tuple[Sequence[int], Sequence[int]]
"""What a member reads before it expects anything, and its own tokens of the text behind that."""


def begun(member: Member, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """A member's tokens of a text in two: the special ones that its tokenizer puts before, or else the first, and the
    rest."""
    token_bytes = spelled_vocabulary(member).token_bytes
    num_before = next((i for i, token_id in enumerate(token_ids) if token_bytes[token_id]), len(token_ids))
    return list(token_ids[: max(1, num_before)]), list(token_ids[max(1, num_before) :])


class GivenReading:
    """`readings`: how each member reads `text`. What stands before it may be all of a conversation, or a part of it.
    `watches`: who is told what, of each member; nobody."""

    def __init__(
        self,
        members: Sequence[Member],
        readings: Sequence[MemberReading],
        text: bytes,
        watches: Sequence[Watch] | None = None,
    ) -> None:
        self._members = members
        self._text = text
        told = watches or [None] * len(members)
        self._readers = [
            _Reader(member, *reading, text, watch)
            for member, reading, watch in zip(members, readings, told, strict=True)
        ]
        self._num_asked: list[int] = []  # rows of each member in this step

    @property
    def is_done(self) -> bool:
        return all(reader.is_done for reader in self._readers)

    @property
    def caches(self) -> Iterator[RowCache]:
        return (reader.cache for reader in self._readers)

    def next_spans(self, budget: int, spare: Spare) -> list[tuple[Member, Span]]:
        """About `budget` tokens for all members together, at least one row for each that has not read all. `spare`: for
        rows beside what members read themselves."""
        share = max(1, budget // len(self._readers))
        asked = [reader.next_spans(share, spare) for reader in self._readers]
        self._num_asked = [len(spans) for spans in asked]
        return [(member, span) for member, spans in zip(self._members, asked, strict=True) for span in spans]

    def take(self, rows: Sequence[torch.Tensor]) -> None:
        """The results of `next_spans`. Raises `MemberError` for NaN."""
        begin = 0
        for reader, num in zip(self._readers, self._num_asked, strict=True):
            reader.take(rows[begin : begin + num])
            begin += num

    def judgement(self) -> Judgement:
        """Once all is read."""
        begin = min(len(self._text), max(reader.begins_at for reader in self._readers))
        targets = np.frombuffer(self._text[begin:], dtype=np.uint8).astype(np.int64)
        rows = np.stack([reader.rows(begin) for reader in self._readers])
        return Judgement(begin, rows, targets)


class _Reader:
    """One member. `begins_at`: the byte of the text before which it expects nothing: behind its first token, if its
    tokenizer puts none before a text."""

    def __init__(
        self, member: Member, head: Sequence[int], path: Sequence[int], text: bytes, watch: Watch | None
    ) -> None:
        self._member = member
        self._watch = watch
        self._vocabulary: SpelledVocabulary = spelled_vocabulary(member)
        token_bytes = self._vocabulary.token_bytes
        self._begin, self._path = list(head), list(path)
        self.begins_at = len(text) - sum(len(token_bytes[token_id]) for token_id in path)
        self._text = text[self.begins_at :]
        self._trunk = Trunk(member, RowCache(), head)
        self._given: GivenText | None = None
        self._histories: list[History] = []  # of its own reading
        self._wave: list[History] = []
        self._has_read = False  # its own reading
        self._is_settled = False

    @property
    def cache(self) -> RowCache:
        return self._trunk.cache

    @property
    def is_done(self) -> bool:
        return self._is_settled and not self._given_text.wanted

    @property
    def _given_text(self) -> GivenText:
        assert self._given is not None, "the beginning of the text is read first"
        return self._given

    def next_spans(self, budget: int, spare: Spare) -> list[Span]:
        adapter, num_read = self._member.adapter, self.cache.length
        ids = [*self._begin, *self._path]
        if not self._has_read:
            chunk = ids[num_read : num_read + min(CHUNK, budget)]
            first_kept = max(num_read, len(self._begin) - 1)
            return [Span(self.cache, chunk, max(0, num_read + len(chunk) - first_kept), adapter)]
        if self.is_done:
            return []
        wanted = self._given_text.wanted
        self._wave = wanted[: max(1, min(WAVE, budget))]
        spans = self._trunk.branches(self._wave, spare)
        self._wave = self._wave[: len(spans)]
        if not spans:
            self._wave = [self._trunk.nearest(wanted)]
            spans = [self._trunk.rewound(self._wave[0])]
        return spans

    def take(self, rows: Sequence[torch.Tensor]) -> None:
        if not rows:
            return
        if any(bool(row[:1].isnan().any()) for row in rows):
            raise MemberError(self._member.name, "its output is not a number (NaN); its weights may be damaged")
        if self._wave:
            found = torch.cat(list(rows))
            histories, self._wave = self._wave, []
        else:
            found = rows[0]
            first = self.cache.length - len(found) - len(self._begin)
            if len(found) and self._given is None:
                (distribution,) = self._vocabulary.order.distributions(found[:1])
                self._given = GivenText(distribution, self._text, watch=self._watch)
                self._histories = self._given.follow(self._path, self._vocabulary.token_bytes)
                found = found[1:]
                first = 0
            histories = self._histories[max(0, first) : max(0, first) + len(found)]
            if self.cache.length == len(self._begin) + len(self._path):
                self._trunk = Trunk(self._member, self.cache, self._begin, self._histories)
                self._has_read = True
        for history, distribution in zip(histories, self._distributions(found), strict=True):
            self._given_text.give(history, distribution)
        if self._given is not None and not self._given.wanted:
            self._given.settle()
            self._is_settled = True

    def rows(self, begin: int) -> np.ndarray:
        """(T - begin, 257), from byte `begin` of the whole text on; see `Judgement.rows`."""
        given, skipped = self._given_text, begin - self.begins_at
        rows, evidence = given.rows()[:-1], given.evidence()
        rows[np.arange(len(rows)), np.frombuffer(self._text, dtype=np.uint8)] = evidence
        return rows[skipped:]

    def _distributions(self, rows: torch.Tensor) -> list[Distribution]:
        order = self._vocabulary.order
        parts = (rows[i : i + SORTED_AT_ONCE] for i in range(0, len(rows), SORTED_AT_ONCE))
        return [distribution for part in parts for distribution in order.distributions(part)]


def pooled_logprobs(judged: Judgement, mixture: Mixture) -> np.ndarray:
    """(T - begin,) nats that the pool gives each byte; posterior weights move along the text, from the prior on."""
    prior = effective_weights(list(mixture.weights.values()))
    weights = np.repeat(prior[:, None], len(judged.targets), axis=1)
    if mixture.pool == "posterior" and len(prior) > 1:
        start = following.start(prior, mixture.share)
        weights = following.track(start, judged.evidence, prior, mixture.share)[0][:, :-1]
    rows = torch.from_numpy(judged.rows)
    pooled = pool(mixture.pool, rows, torch.from_numpy(weights)) if len(prior) > 1 else rows[0]
    return pooled.gather(1, torch.from_numpy(judged.targets)[:, None])[:, 0].numpy()


def scored_pieces(
    judged: Judgement, mixture: Mixture, token_ids: Sequence[int], token_bytes: Sequence[bytes]
) -> list[TokenLogprob]:
    """The surface's tokens of a text with what the pool gives their bytes; None where not all members expected them."""
    logprobs = pooled_logprobs(judged, mixture) if len(judged.targets) else np.empty(0)
    pieces, begin = [], 0
    for token_id in token_ids:
        data = token_bytes[token_id]
        end = begin + len(data)
        logprob = None
        if data and begin >= judged.begin:
            logprob = float(logprobs[begin - judged.begin : end - judged.begin].sum())
        pieces.append(TokenLogprob(token_id, data.decode(errors="replace"), data, logprob))
        begin = end
    return pieces
