"""What a member expects of a text, told in the tokens of another vocabulary, at the borders of that one's tokens.

The next token is taken to be the longest that the text goes on with, so that exactly one is:

    Q(v) = P(v | b) - Σ over the next longer tokens u of v  P(u | b)

where P(s | b) is the probability that a text that begins with b goes on with the string s: the member's own ways to
spell that are summed out (`given_text`), and a border need not be one of the member's. Q and the end of the text sum to
one. P(s | b) is exact for strings that came, and else but for one thing: where the member would need two tokens or more
behind the place at which s leaves the text, which nobody has asked it about. That mass stays with the longest token
that is known to be begun.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.spelling.byte_order import ByteOrder, Distribution
from ensemble_server.ensembles.spelling.given_text import GivenText, Walk

NEGLIGIBLE = 1e-7  # probability of one token that is not told
MAX_KEPT = 20_000  # places between tokens; most are of a few tokens
Row = tuple[np.ndarray, np.ndarray]
"""Ids of tokens and their probabilities, which sum to one but for what is not told."""


class TokenTree:
    """Tokens by their strings. `token_bytes`: of every id, b"" for those that stand for none; `end_id`: the one that
    ends a text. Of tokens with the same string the last is meant: byte tokens stand before letters."""

    def __init__(self, token_bytes: Sequence[bytes], end_id: int | None) -> None:
        by_string = {data: token_id for token_id, data in enumerate(token_bytes) if data and token_id != end_id}
        self.strings = sorted(by_string)
        self.ids = np.array([by_string[data] for data in self.strings], dtype=np.int64)
        self.index = {data: place for place, data in enumerate(self.strings)}
        self.end_id = end_id
        self.max_length = max(map(len, self.strings), default=0)
        self.parents = np.full(len(self.strings), -1, dtype=np.int64)  # the next shorter token; -1: none
        begun: list[int] = []
        for place, data in enumerate(self.strings):
            while begun and not data.startswith(self.strings[begun[-1]]):
                begun.pop()
            if begun:
                self.parents[place] = begun[-1]
            begun.append(place)

    def longer(self, data: bytes) -> tuple[int, int]:
        """Places of the strings that begin with `data` and are longer."""
        return bisect_right(self.strings, data), _end_of(self.strings, data)

    def longest(self, data: bytes) -> int:
        """Place of the longest string that `data` begins with; -1: none."""
        return next((self.index[data[:n]] for n in range(len(data), 0, -1) if data[:n] in self.index), -1)


@dataclass(frozen=True)
class _Ranges:
    """Where a member's tokens stand that go on with each string. `lo`, `hi`: of each of `places` of the tree;
    `parents`: indices into these arrays, -1 for the shortest, whose mass is taken from `rest`; `all_lo`, `all_hi`: of
    all tokens that go on at all."""

    places: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    parents: np.ndarray
    rest: int
    all_lo: int
    all_hi: int


class Projection:
    """From one member's vocabulary to a tree; kept for all texts."""

    def __init__(self, order: ByteOrder, tree: TokenTree) -> None:
        self.tree = tree
        self._strings = [order.bytes_at(place) for place in range(len(order.ids))]
        self._ranges: dict[tuple[bytes, bytes], _Ranges] = {}

    def of(self, distribution: Distribution, pending: bytes, known: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Places of the tree and their part of Q, some of it negative: of the member's tokens that go on from what is
        `pending`, relative to all of these, where `known` is what the tree's token has of the text already."""
        ranges = self._ranges.get((pending, known))
        if ranges is None:
            if len(self._ranges) == MAX_KEPT:
                self._ranges.clear()
            ranges = self._ranges[pending, known] = self._found(pending, known)
        masses = distribution.between(ranges.lo, ranges.hi)
        if pending:
            masses /= max(float(distribution.between(np.array([ranges.all_lo]), np.array([ranges.all_hi]))[0]), 1e-300)
        inside = ranges.parents >= 0
        own = masses - np.bincount(ranges.parents[inside], masses[inside], minlength=len(masses))
        told = np.abs(own) > NEGLIGIBLE
        places, own = ranges.places[told], own[told]
        if ranges.rest >= 0:
            places, own = np.append(places, ranges.rest), np.append(own, -masses[~inside].sum())
        return places, own

    def _found(self, pending: bytes, known: bytes) -> _Ranges:
        tree, strings = self.tree, self._strings
        all_lo, all_hi = bisect_right(strings, pending), _end_of(strings, pending)
        first, last = tree.longer(known)
        found: dict[int, tuple[int, int]] = {}
        if all_hi - all_lo < last - first:
            for place in range(all_lo, all_hi):
                more = strings[place][len(pending) :]
                for length in range(1, len(more) + 1):
                    index = tree.index.get(known + more[:length])
                    if index is not None:
                        found[index] = (found.get(index, (place, 0))[0], place + 1)
        else:
            for index in range(first, last):
                data = pending + tree.strings[index][len(known) :]
                lo = bisect_left(strings, data, all_lo, all_hi)
                if lo < all_hi and strings[lo].startswith(data):
                    found[index] = (lo, _end_of(strings, data))
        places = np.array(sorted(found), dtype=np.int64)
        local = {place: i for i, place in enumerate(places.tolist())}
        borders = np.array([found[place] for place in local], dtype=np.int64).reshape(-1, 2)
        parents = np.array([local.get(int(tree.parents[place]), -1) for place in local], dtype=np.int64)
        return _Ranges(places, borders[:, 0], borders[:, 1], parents, tree.longest(known), all_lo, all_hi)


@dataclass(frozen=True)
class _Part:
    walk: Walk
    log_share: float  # of the walk's tokens, those that go on from what is pending
    places: np.ndarray
    probs: np.ndarray


class ProjectedText:
    """Watches one member read a text, and tells then what it expected at each of `borders`, bytes of `text`.

    What the member reads may begin later than `text`: see `begins_at`, before which it expects nothing.
    """

    def __init__(self, projection: Projection, text: bytes, borders: Sequence[int]) -> None:
        self._projection = projection
        self._text = text
        self._borders = np.asarray(borders, dtype=np.int64)
        self._parts: list[list[_Part]] = [[] for _ in borders]
        self._ends: list[list[Walk]] = [[] for _ in borders]
        self._given: GivenText | None = None

    def __call__(self, given: GivenText, walk: Walk, distribution: Distribution) -> None:
        """As `GivenText` tells of each history that it looks at."""
        self._given = given
        end, tree = self.begins_at + walk.end, self._projection.tree
        first = np.searchsorted(self._borders, end - tree.max_length + 1)
        last = np.searchsorted(self._borders, end + len(walk.masses))
        for index in range(int(first), int(last)):
            border = int(self._borders[index])
            pending, known = self._text[end:border], self._text[border:end]
            if border == end:
                self._ends[index].append(walk)
            elif border < end:
                lo, hi = tree.longer(known)
                if lo == hi:
                    continue
            log_share = walk.log_masses[border - end] if pending else 0.0
            self._parts[index].append(_Part(walk, log_share, *self._projection.of(distribution, pending, known)))

    @property
    def begins_at(self) -> int:
        assert self._given is not None, "nothing has been read"
        return len(self._text) - len(self._given.text)

    def evidence(self) -> np.ndarray:
        """(T - begins_at,) nats of each byte."""
        assert self._given is not None, "nothing has been read"
        return self._given.evidence()

    def rows(self) -> list[Row | None]:
        """What was expected at each border, once all is read; None where nothing was."""
        assert self._given is not None, "nothing has been read"
        totals, tree, found = self._given.totals, self._projection.tree, []
        for border, parts, ends in zip(self._borders.tolist(), self._parts, self._ends, strict=True):
            place = border - self.begins_at
            if place < 0 or not parts:
                found.append(None)
                continue
            mass = np.zeros(len(tree.strings))
            for part in parts:
                mass[part.places] += np.exp(part.walk.logprob + part.log_share - totals[place]) * part.probs
            told = np.flatnonzero(mass > NEGLIGIBLE)
            ids, probs = tree.ids[told], mass[told]
            if tree.end_id is not None:
                end = sum(np.exp(walk.logprob + walk.log_end - totals[place]) for walk in ends)
                ids, probs = np.append(ids, tree.end_id), np.append(probs, end)
            found.append((ids, probs))
        return found


def _end_of(strings: Sequence[bytes], data: bytes) -> int:
    """Where those of the sorted `strings` end that begin with `data`."""
    bare = data.rstrip(b"\xff")
    return bisect_left(strings, bare[:-1] + bytes([bare[-1] + 1])) if bare else len(strings)
