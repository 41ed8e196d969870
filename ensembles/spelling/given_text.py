"""All the ways in which a member's tokens can spell a text that is there already.

What a lattice does byte by byte, in waves: the member's own reading of the text first, whose distributions one prefill
gives; then at once all tokens off that path that have their share of the weight, then what these lead to, until none is
left.
The rules are those of `lattice`: histories that end at one byte with the same token are one, and one is looked at if
its share exceeds epsilon where it arises, or may exceed it where the text surprises.

Each history is kept as what it says of the bytes behind it, relative to its own weight: the masses of the next bytes
and the tokens that may have ended. Weights follow from those in one pass over the text, again after each wave, so what
is found late counts in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ensemble_server.ensembles.spelling import END, ROW
from ensemble_server.ensembles.spelling.byte_order import Distribution, log_of
from ensemble_server.ensembles.spelling.lattice import DROPPED, EPSILON, UNLIKELY, History

Key = tuple[int, int]  # where a history ends, and its last token
BEGIN: Key = (0, -1)


@dataclass(slots=True)
class Walk:
    """One history and what it says of the text behind it.

    `masses[i]`: the bytes that can follow i bytes behind its end, and their probabilities; `log_masses[i]`: of all that
    can, END included where i is 0; `closings`: tokens that may end behind it, with their log-probability.
    """

    history: History | None
    log_end: float
    masses: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    log_masses: list[float] = field(default_factory=list)
    closings: list[tuple[Key, float]] = field(default_factory=list)
    logprob: float = -math.inf

    @property
    def end(self) -> int:
        return 0 if self.history is None else self.history.end

    @property
    def begin_of_last(self) -> int:
        return 0 if self.history is None or self.history.parent is None else self.history.parent.end


Watch = Callable[["GivenText", Walk, Distribution], None]
"""Is told of every history that is looked at, with what the member expects behind it. Its `logprob` is known only when
all is settled."""


class GivenText:
    """See the module's docstring. `distribution`: what the member expects where `text` begins.

    `wanted` lists histories whose distributions are to be given, all of them before `settle` asks for the next wave.
    """

    def __init__(
        self, distribution: Distribution, text: bytes, *, epsilon: float = EPSILON, watch: Watch | None = None
    ) -> None:
        self.text = text
        self._watch = watch
        self.wanted: list[History] = []
        self._epsilon = epsilon
        self._walks: dict[Key, Walk] = {BEGIN: self._walk(None, distribution)}
        self._totals = np.zeros(len(text) + 1)  # log P of the text up to each byte
        self._asleep = np.zeros(len(text) + 1)  # share of what ends at each byte and was not looked at

    def follow(self, token_ids: Sequence[int], token_bytes: Sequence[bytes]) -> list[History]:
        """The histories of the member's own reading of the text: wanted first of all. `token_bytes`: of every id."""
        history, path = None, []
        for token_id in token_ids:
            end = (0 if history is None else history.end) + len(token_bytes[token_id])
            history = History(history, token_id, end, len(path) + 1)
            path.append(history)
        self.wanted += path
        return path

    def give(self, history: History, distribution: Distribution) -> None:
        """The distribution after one of `wanted`."""
        self.wanted.remove(history)
        self._walks[history.end, history.token_id] = self._walk(history, distribution)

    def settle(self) -> None:
        """Sum up what is known; what is `wanted` then is the next wave. Nothing may be wanted before."""
        assert not self.wanted, "distributions are wanted before weights can be told"
        weights, parents = self._weigh()
        self.wanted = self._looked_at(weights, parents)

    @property
    def totals(self) -> np.ndarray:
        """(T + 1,) float64: log P of the text up to each byte."""
        return self._totals

    def evidence(self) -> np.ndarray:
        """(T,) float64: log p of each byte of the text; its sum is log P(text)."""
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(np.diff(self._totals), nan=-np.inf, neginf=-np.inf)

    def rows(self) -> np.ndarray:
        """(T + 1, 257) float64: log-probabilities of what comes next, before each byte and after the last.

        The share of what sleeps at a byte goes to all bytes alike, as in `Lattice.row` with `spreads`.
        """
        masses = np.zeros((len(self.text) + 1, ROW))
        for walk in self._walks.values():
            if walk.logprob == -math.inf:
                continue
            for offset, (following, probs) in enumerate(walk.masses):
                place = walk.end + offset
                masses[place, following] += math.exp(walk.logprob - self._totals[place]) * probs
            masses[walk.end, END] += math.exp(walk.logprob - self._totals[walk.end] + walk.log_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            probs = masses / masses.sum(1, keepdims=True)
            return np.log((1 - self._asleep[:, None]) * probs + self._asleep[:, None] / ROW)

    def _walk(self, history: History | None, distribution: Distribution) -> Walk:
        walk = Walk(history, distribution.log_end)
        order, node = distribution.order, distribution.order.root
        walk.masses.append((node.bytes, distribution.masses(node)))
        walk.log_masses.append(0.0)
        for place in range(walk.end, len(self.text)):
            child = node.child(self.text[place])
            if child is None:
                break
            node = child
            for token in range(node.lo, node.eq):
                logprob = distribution.logprob(token)
                if logprob > -math.inf:
                    walk.closings.append(((place + 1, int(order.ids[token])), logprob))
            masses = distribution.masses(node)
            log_mass = log_of(float(masses.sum()))
            if log_mass == -math.inf:
                break
            walk.masses.append((node.bytes, masses))
            walk.log_masses.append(log_mass)
        if self._watch is not None:
            self._watch(self, walk, distribution)
        return walk

    def _weigh(self) -> tuple[dict[Key, float], dict[Key, History | None]]:
        """-> the weight of every history that is known or could be, and the heaviest one that leads to it."""
        weights: dict[Key, float] = {BEGIN: 0.0}
        parents: dict[Key, History | None] = {}
        heaviest: dict[Key, float] = {}
        at: list[list[float]] = [[] for _ in range(len(self.text) + 1)]
        for key, walk in sorted(self._walks.items(), key=lambda item: item[0][0]):
            walk.logprob = weights.get(key, -math.inf)
            if walk.logprob == -math.inf:
                continue
            for offset, log_mass in enumerate(walk.log_masses):
                at[walk.end + offset].append(walk.logprob + log_mass)
            for closing, logprob in walk.closings:
                weight = walk.logprob + logprob
                weights[closing] = float(np.logaddexp(weights[closing], weight)) if closing in weights else weight
                if weight > heaviest.get(closing, -math.inf):
                    heaviest[closing], parents[closing] = weight, walk.history
        sleeping: list[list[float]] = [[] for _ in at]
        for key, weight in weights.items():
            if key not in self._walks:
                at[key[0]].append(weight)
                sleeping[key[0]].append(weight)
        self._totals = np.array([np.logaddexp.reduce(ways) if ways else -np.inf for ways in at])
        shares = [np.logaddexp.reduce(ways) if ways else -np.inf for ways in sleeping]
        self._asleep = np.exp(np.array(shares) - np.where(np.isfinite(self._totals), self._totals, 0.0))
        return weights, parents

    def _looked_at(self, weights: dict[Key, float], parents: dict[Key, History | None]) -> list[History]:
        """Those that sleep and have, or may have had, more than their share."""
        totals, least = self._totals, log_of(self._epsilon)
        gains = np.maximum(0.0, math.log(UNLIKELY) - self.evidence())
        surprise = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(gains), gains, 0.0))])
        last = self._last_retained()
        found = []
        for key, weight in weights.items():
            end, token_id = key
            if key in self._walks or weight == -math.inf:
                continue
            if weight - totals[end] + surprise[last[end]] - surprise[end] > least:
                parent = parents[key]
                found.append(History(parent, token_id, end, 1 if parent is None else parent.length + 1))
        return found

    def _last_retained(self) -> list[int]:
        """For each byte, how long a history that ends there may be looked at: until the last tokens of all that
        counts then began behind it."""
        num = len(self.text) + 1
        reach = [num] * num
        least = log_of(DROPPED * self._epsilon)
        for walk in self._walks.values():
            for offset, log_mass in enumerate(walk.log_masses):
                place = walk.end + offset
                if walk.logprob + log_mass >= self._totals[place] + least:
                    reach[place] = min(reach[place], walk.begin_of_last)
        last = []
        for end in range(num):
            place = end
            while place + 1 < num and reach[place] <= end:
                place += 1
            last.append(place)
        return last
