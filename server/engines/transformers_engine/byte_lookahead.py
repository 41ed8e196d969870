"""Alternatives to a piece of text: with which other tokens of the surface could it go on, and how likely are they?

Candidates are the tokens that members expect at that place, as far as they are known: a token of another vocabulary
stands for the longest one of the surface that it begins with. What a candidate is worth is not what its token has, but
what its bytes have under the pool: the same sum over all ways to spell them as that of the piece which is chosen in the
end. So copies of the members' lattices are fed the candidates, and want forwards where these do not lie within one
token. Candidates with the same beginning share its copies.

No candidate is the beginning of another, the likeliest token first: what is listed excludes each other, and its
probabilities sum to at most one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.base import TokenLogprob
from ensemble_server.ensembles.spelling import END, ROW, utf8
from ensemble_server.ensembles.spelling.byte_order import Distribution
from ensemble_server.ensembles.spelling.lattice import History, Lattice
from ensemble_server.server.engines.transformers_engine.byte_pool import BytePool
from ensemble_server.server.weights.spelled_vocabulary import SpelledVocabulary
from ensemble_server.server.weights.tokenizer import Vocabulary

PER_PLACE = 2  # candidates for each alternative that is asked for: tokens are not ranked as their bytes are


@dataclass(frozen=True)
class Scored:
    """A way to go on: its bytes (None: the text ends), their log-probability under the pool and under each member."""

    data: bytes | None
    logprob: float
    members: Sequence[float]


@dataclass
class _Branch:
    """The text with `data` behind it, on the way to `units`, which all begin with that and are longer."""

    data: bytes
    units: list[bytes]
    lattices: list[Lattice | None]
    pool: BytePool
    logprob: float
    members: Sequence[float]

    @property
    def is_waiting(self) -> bool:
        return any(lattice is not None and lattice.wanted for lattice in self.lattices)


class Lookahead:
    """`lattices`: one per member where the piece begins, not changed; None for one that cannot write the text.

    `vocabulary`: the surface's; `utf8_state`: of the text; `num_top`: alternatives under the pool; `num_of_members`:
    under each member. As long as it `is_waiting`, `wanted` distributions are to be given.
    """

    def __init__(
        self,
        lattices: Sequence[Lattice | None],
        pool: BytePool,
        vocabulary: SpelledVocabulary,
        utf8_state: int,
        *,
        num_top: int,
        num_of_members: int = 0,
    ) -> None:
        num = PER_PLACE * max(num_top, num_of_members)
        expected = [_expected(lattice, vocabulary, utf8_state, num) for lattice in lattices]
        weights = np.maximum(pool.weights, 0.0)
        mixed: defaultdict[bytes, float] = defaultdict(float)
        for weight, units in zip(weights.tolist(), expected, strict=True):
            for unit, share in units.items():
                mixed[unit] += weight * share
        self._units = _best(mixed, PER_PLACE * num_top)
        self._units_of_members = [_best(units, PER_PLACE * num_of_members) for units in expected]
        self._scores: dict[bytes, Scored] = {}
        self._end: Scored | None = None
        self._waiting: list[_Branch] = []
        units = dict.fromkeys(unit for ranked in (self._units, *self._units_of_members) for unit in ranked)
        self._go_on(_Branch(b"", list(units), list(lattices), pool, 0.0, [0.0] * len(lattices)))

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def wanted(self) -> list[tuple[int, History]]:
        """Members, by their places, and the histories whose distributions they are to give."""
        return list(dict.fromkeys(self._all_wanted()))

    def give(self, k: int, history: History, distribution: Distribution) -> None:
        """The distribution of member k after one of the histories `wanted`."""
        waiting, self._waiting = self._waiting, []
        for branch in waiting:
            lattice = branch.lattices[k]
            if lattice is not None and history in lattice.wanted:
                lattice.give(history, distribution)
                branch.lattices[k] = None if lattice.is_dead else lattice
            self._go_on(branch)

    def stop(self) -> None:
        """What is not scored yet is left out."""
        self._waiting = []

    def listed(self, chosen: Scored, num: int, member: int | None = None) -> list[Scored]:
        """Up to `num` ways to go on, the likeliest under the pool (or under one member) first. None is the beginning of
        another, and of those that begin with `chosen` or that it begins with, it is the one."""

        def worth(scored: Scored) -> float:
            return scored.logprob if member is None else scored.members[member]

        kept = [chosen]
        for unit in self._units if member is None else self._units_of_members[member]:
            scored = self._scores.get(unit)
            if scored is not None and worth(scored) > -math.inf and not _is_nested(unit, kept):
                kept.append(scored)
        if self._end is not None and worth(self._end) > -math.inf:
            kept.append(self._end)
        return sorted(kept, key=worth, reverse=True)[:num]

    def _all_wanted(self) -> Iterator[tuple[int, History]]:
        for branch in self._waiting:
            for k, lattice in enumerate(branch.lattices):
                if lattice is not None:
                    yield from ((k, history) for history in lattice.wanted)

    def _go_on(self, branch: _Branch) -> None:
        """Score what needs no forward."""
        branches = [branch]
        while branches:
            branch = branches.pop()
            if branch.is_waiting:
                self._waiting.append(branch)
            else:
                branches += self._next(branch)

    def _next(self, branch: _Branch) -> Iterator[_Branch]:
        """Score units that end with the next byte; -> branches for those that are longer."""
        pool = branch.pool
        if branch.data:
            pool = pool.after([-math.inf if one is None else one.evidence for one in branch.lattices])
        rows = [
            np.full(ROW, -math.inf) if lattice is None else lattice.row(spreads=pool.spreads)
            for lattice in branch.lattices
        ]
        pooled, _ = pool.pooled(rows)

        def scored(symbol: int, data: bytes | None) -> Scored:
            of_members = [own + float(row[symbol]) for own, row in zip(branch.members, rows, strict=True)]
            return Scored(data, branch.logprob + float(pooled[symbol]), of_members)

        if not branch.data:
            self._end = scored(END, None)
        place = len(branch.data)
        by_byte: dict[int, list[bytes]] = {}
        for unit in branch.units:
            by_byte.setdefault(unit[place], []).append(unit)
        for byte, units in by_byte.items():
            data = branch.data + bytes([byte])
            score = scored(byte, data)
            if data in units:
                self._scores[data] = score
                units.remove(data)
            if units and score.logprob > -math.inf:
                lattices = [_fed(lattice, byte) for lattice in branch.lattices]
                yield _Branch(data, units, lattices, pool, score.logprob, score.members)


def told(
    listed: Iterable[Scored],
    chosen: Scored,
    token_id: int,
    vocabulary: SpelledVocabulary,
    surface: Vocabulary,
    member: int | None = None,
) -> tuple[TokenLogprob, ...]:
    """What is `listed`, as tokens of the surface; `token_id`: that of `chosen`. `member`: whose log-probabilities are
    told; None: the pool's."""
    alternatives = []
    for one in listed:
        if one is chosen:
            own_id: int | None = token_id
        elif one.data is None:  # the text ends
            own_id = min(vocabulary.order.end_ids.tolist(), default=None)
        else:
            own_id = vocabulary.order.longest(one.data)
        if own_id is None:
            continue
        data = surface.bytes_of(own_id) if one.data is None else one.data
        logprob = one.logprob if member is None else one.members[member]
        alternatives.append(TokenLogprob(own_id, data.decode(errors="replace"), data, float(logprob)))
    return tuple(alternatives)


def _expected(lattice: Lattice | None, vocabulary: SpelledVocabulary, utf8_state: int, num: int) -> dict[bytes, float]:
    """Tokens of the surface with which a member expects the text to go on, and with which probability."""
    units: defaultdict[bytes, float] = defaultdict(float)
    for data, share in () if lattice is None else lattice.likeliest(num):
        token_id = vocabulary.order.longest(data)
        if token_id is not None and _may_follow(utf8_state, unit := vocabulary.token_bytes[token_id]):
            units[unit] += share
    return units


def _best(shares: dict[bytes, float], num: int) -> list[bytes]:
    """Of the `num` largest those that do not begin, and are not begun by, a larger one."""
    kept: list[bytes] = []
    for unit in sorted(shares, key=lambda unit: (-shares[unit], unit))[:num]:
        if not any(unit.startswith(other) or other.startswith(unit) for other in kept):
            kept.append(unit)
    return kept


def _may_follow(state: int, data: bytes) -> bool:
    for byte in data:
        state = int(utf8.NEXT[state, byte])
    return state != utf8.BROKEN


def _is_nested(unit: bytes, kept: Iterable[Scored]) -> bool:
    return any(
        other.data is not None and (unit.startswith(other.data) or other.data.startswith(unit)) for other in kept
    )


def _fed(lattice: Lattice | None, byte: int) -> Lattice | None:
    if lattice is None:
        return None
    twin = lattice.fork()
    twin.feed(byte)
    return None if twin.is_dead else twin
