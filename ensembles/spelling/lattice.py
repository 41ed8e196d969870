"""All the ways in which a member's tokens can spell a text, summed while the text is being written.

Which tokens a text was cut into is a hidden variable. A *hypothesis* is a sequence of tokens and, behind it, bytes that
are *pending*: the beginning of a token that is not known yet. Its weight is the probability of its tokens times that of
all tokens that go on from what is pending. Where the pending bytes are a token, that token may have ended there: a
*closing*, a history that is one token longer. Its weight is known at once, but it needs the member's distribution
before it can say what follows. It sleeps until it is looked at:

- where it arises, if its share of all weight exceeds `epsilon`;
- later, when the text surprises: the share of a sleeper may have grown by UNLIKELY / p(byte) at each byte that had less
  than UNLIKELY, and it is looked at as soon as it may exceed epsilon;
- when nothing that is awake explains the text, the heaviest one.

Sleepers are forgotten once the last token of all that is awake began behind them and the next one is known: until
then what follows can still tell that this token was several. Every byte is a token, so there is always a way on.

Closings that end at one byte with the same token become one (*recombination*): the heaviest history stands for all,
with their summed weight. The last token must agree since pretokenizers look ahead: how a run of newlines was cut
tells what follows. Without recombination histories that differ in one old token would live on side by side, each
wanting forwards of its own.

`exact` sums everything but sleepers whose weights together are at most epsilon of all: a row is then within total
variation epsilon of the true one, and epsilon 0 is enumeration. The cost grows exponentially: it is for tests.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.spelling import END, ROW
from ensemble_server.ensembles.spelling.byte_order import Distribution, Node, log_of

EPSILON = 0.01
UNLIKELY = 0.02  # a byte with less surprises; a history that sleeps may have expected it
DROPPED = 0.1  # of epsilon: hypotheses with a smaller share fall asleep, and lose their distributions
MAX_WOKEN = 4  # sleepers that one surprise wakes at once, before it is seen whether they explain it


@dataclass(frozen=True, eq=False, slots=True)
class History:
    """Tokens behind the lattice's beginning: `token_id`, which ends at byte `end`, behind those of `parent`."""

    parent: History | None
    token_id: int
    end: int
    length: int

    def tokens(self) -> list[int]:
        """Their ids, first to last."""
        return [step.token_id for step in self.steps()][::-1]

    def steps(self) -> Iterator[History]:
        """This one, then its ancestors."""
        step: History | None = self
        while step is not None:
            yield step
            step = step.parent


@dataclass(slots=True)
class Hypothesis:
    """`logprob` of its tokens. `masses`: of the bytes that can follow inside the token that is pending."""

    history: History | None
    logprob: float
    distribution: Distribution
    node: Node
    masses: np.ndarray
    log_mass: float  # of all that can follow, END included where nothing is pending

    @property
    def end(self) -> int:
        return 0 if self.history is None else self.history.end

    @property
    def begin_of_last(self) -> int:
        """Where its last token begins."""
        return 0 if self.history is None or self.history.parent is None else self.history.parent.end

    @property
    def log_weight(self) -> float:
        return self.logprob + self.log_mass


@dataclass(slots=True)
class Closing:
    """A history whose distribution is not known. `key`: the logarithm of its share where it fell asleep, less the
    surprise of the text up to there. `spelled`: how far its own closings are known, from when it was awake."""

    history: History
    logprob: float
    key: float = -math.inf
    spelled: int = 0


class Lattice:
    """See the module's docstring. The text begins where `distribution` holds.

    `wanted` lists histories whose distributions must be given before the text can go on: `feed` a byte, `give` until
    nothing is wanted, then ask for `row` and `evidence`.
    """

    def __init__(self, distribution: Distribution, *, epsilon: float = EPSILON, exact: bool = False) -> None:
        self.order = distribution.order
        self.text = bytearray()
        self.wanted: list[History] = []
        self.log_total = 0.0  # log P(text): of all weight
        self.evidence = 0.0  # log P(text) less that before the last byte
        self._epsilon = epsilon
        self._exact = exact
        self._awake = [_begun(None, 0.0, distribution)]
        self._new: list[Closing] = []  # closings at the end of the text
        self._asleep: list[Closing] = []  # all others
        self._woken: dict[History, Closing] = {}  # of `wanted`
        self._log_totals = [0.0]  # after each byte
        self._surprise = [0.0]  # by how much the share of a sleeper may have grown, up to each byte, in nats

    @property
    def position(self) -> int:
        return len(self.text)

    @property
    def is_dead(self) -> bool:
        """Whether no tokens spell the text, as far as this lattice knows."""
        return not (self._awake or self._new or self._asleep or self._woken)

    @property
    def num_awake(self) -> int:
        return len(self._awake)

    @property
    def may_begin_here(self) -> bool:
        """Whether somebody awake has a token that ends where the text does, and expects the next one."""
        return any(one.node.depth == 0 for one in self._awake)

    def fork(self) -> Lattice:
        """Another one that continues from here. Nothing may be wanted."""
        assert not self._woken, "a lattice that waits for distributions cannot be copied"
        twin = copy.copy(self)
        twin.text = bytearray(self.text)
        twin.wanted, twin._woken = [], {}
        twin._awake = [copy.copy(one) for one in self._awake]
        twin._new = [copy.copy(one) for one in self._new]
        twin._asleep = [copy.copy(one) for one in self._asleep]
        twin._log_totals = list(self._log_totals)
        twin._surprise = list(self._surprise)
        return twin

    def feed(self, byte: int) -> None:
        """The text goes on with `byte`. Nothing may be wanted."""
        assert not self._woken, "distributions are wanted before the text can go on"
        self.text.append(byte)
        self._asleep += self._new
        closings: list[Closing] = []
        self._awake = [one for one in self._awake if _step(one, byte, self.position, closings)]
        self._new = closings if self._exact else _recombined(closings)
        self._log_totals.append(-math.inf)
        self._surprise.append(self._surprise[-1])
        self._settle()

    def give(self, history: History, distribution: Distribution) -> None:
        """The distribution after one of `wanted`."""
        closing = self._woken.pop(history)
        self.wanted.remove(history)
        hypothesis = _begun(history, closing.logprob, distribution)
        closings: list[Closing] = []
        for place in range(history.end, self.position):
            if not _step(hypothesis, self.text[place], place + 1, closings):
                break
        else:
            self._awake.append(hypothesis)
        self._place_late(one for one in closings if one.history.end > closing.spelled)
        if not self._woken:
            self._settle()

    def wake_likely(self, log_share: float) -> None:
        """Look at closings at the end of the text that have more than this share of all weight: for a text that cannot
        go on as those that are awake expect."""
        self._wake([one for one in self._new if one.logprob > self.log_total + log_share])

    def row(self, *, spreads: bool = False) -> np.ndarray:
        """(257,) float64: log-probabilities of what comes next, normalised; all -inf if nobody awake knows.

        What only sleepers could give has none. Where an impossible byte would be a veto, or with a negative weight a
        certainty, `spreads` gives the share of what sleeps at the end of the text to all bytes alike.
        """
        assert not self._woken, "distributions are wanted before a row can be told"
        mass = np.zeros(ROW)
        best = max((one.log_weight for one in self._awake), default=-math.inf)
        if best == -math.inf:
            return np.full(ROW, -math.inf)
        for one in self._awake:
            weight = math.exp(one.logprob - best)  # of masses that are small where many tokens are long
            mass[one.node.bytes] += weight * one.masses
            if one.node.depth == 0:
                mass[END] += weight * math.exp(one.distribution.log_end)
        mass /= mass.sum()
        if spreads and self._new:
            asleep = math.exp(_log_sum(one.logprob for one in self._new) - self.log_total)
            mass = (1 - asleep) * mass + asleep / ROW
        with np.errstate(divide="ignore"):
            return np.log(mass)

    def likeliest(self, num: int) -> list[tuple[bytes, float]]:
        """What the `num` likeliest tokens of each hypothesis that is awake add to the text, and their probabilities.

        The same bytes may be there more than once. What sleeps, and closings within a token, do not count.
        """
        assert not self._woken, "distributions are wanted before it is known what may follow"
        return [
            (self.order.bytes_at(place, one.node.depth), math.exp(one.logprob + logprob - self.log_total))
            for one in self._awake
            for place, logprob in one.distribution.likeliest(one.node, num)
        ]

    def log_end(self) -> float:
        """The evidence of END: log P(text, END) less log P(text). What sleeps at the end of the text does not count."""
        ends = [one.logprob + one.distribution.log_end for one in self._awake if one.node.depth == 0]
        return _log_sum(ends) - self.log_total

    def settled(self) -> History | None:
        """The longest history that all hypotheses have in common."""
        histories = [one.history for one in self._awake] + [one.history for one in self._woken.values()]
        common = histories[0] if histories else None
        for history in histories[1:]:
            while common is not history:
                if common is None or history is None:
                    return None
                if common.length >= history.length:
                    common = common.parent
                else:
                    history = history.parent
        return common

    def heaviest(self) -> History | None:
        """The most likely history that ends where the text does; of the heaviest hypothesis if none does."""
        here = [(one.logprob, one.history) for one in self._awake if one.end == self.position]
        here += [(one.logprob, one.history) for one in self._new]
        if not here:
            here = [(one.log_weight, one.history) for one in self._awake]
        return max(here, key=lambda pair: pair[0], default=(0.0, None))[1]

    # --- what happens after a byte, and after each distribution that came ------------------------------------------

    def _settle(self) -> None:
        """Sum up what is known, wake who must be woken, forget what is too small."""
        here = self.position
        if self._exact:
            self._wake_exactly()
        else:
            self._wake_new()
        self._sum_up()
        if not self._exact and not self._woken:
            self._wake_surprised()
        if self._woken:
            return
        if not self._exact:
            self._lull()
            for one in self._new:
                one.key = one.logprob - self.log_total - self._surprise[here]

    def _lull(self) -> None:
        """Let hypotheses sleep that are small by now, and forget sleepers that what is awake has left behind."""
        here, least = self.position, self.log_total + log_of(DROPPED * self._epsilon)
        for one in self._awake:
            if one.log_weight < least and one.history is not None:
                key = one.log_weight - self.log_total - self._surprise[here]
                self._asleep.append(Closing(one.history, one.logprob, key, spelled=here))
        self._awake = [one for one in self._awake if one.log_weight >= least]
        first = min((one.begin_of_last for one in self._awake), default=0)
        self._asleep = [one for one in self._asleep if one.history.end >= first]

    def _sum_up(self) -> None:
        here = self.position
        weights = [one.log_weight for one in self._awake] + [one.logprob for one in self._new]
        weights += [one.logprob for one in self._woken.values() if one.history.end == here]
        self.log_total = self._log_totals[here] = _log_sum(weights)
        before = self._log_totals[here - 1] if here else 0.0
        self.evidence = self.log_total - before if self.log_total > -math.inf else -math.inf
        if here:
            gain = max(0.0, math.log(UNLIKELY) - self.evidence)
            self._surprise[here] = self._surprise[here - 1] + (gain if gain < math.inf else 0.0)

    def _wake_new(self) -> None:
        """Look at closings that end at the end of the text, if they have more than their share."""
        weights = [one.log_weight for one in self._awake] + [one.logprob for one in self._new]
        least = _log_sum(weights) + log_of(self._epsilon)
        self._wake([one for one in self._new if one.logprob > least])

    def _wake_surprised(self) -> None:
        """Look at sleepers that may have more than their share by now, or at the heaviest if nothing else is left."""
        if self.log_total == -math.inf or not (self._awake or self._new):
            self._wake([max(self._asleep, key=lambda one: one.key)] if self._asleep else [])
            return
        least = log_of(self._epsilon) - self._surprise[self.position]
        surprised = [one for one in self._asleep if one.key > least]
        self._wake(sorted(surprised, key=lambda one: -one.key)[:MAX_WOKEN])
        if not self._woken and not self._awake:  # only closings that are too many to be looked at one by one
            self._wake([max(self._new, key=lambda one: one.logprob)])

    def _wake_exactly(self) -> None:
        sleepers = sorted(self._asleep + self._new, key=lambda one: one.logprob)
        known = _log_sum(one.log_weight for one in self._awake)
        known = _log_sum([known, *(one.logprob for one in self._woken.values() if one.history.end == self.position)])
        unknown = 0.0 if known > -math.inf else math.inf  # relative to what is known
        keep = 0
        for one in sleepers:
            if known == -math.inf:
                break
            unknown += math.exp(min(one.logprob - known, 700.0))
            if unknown > self._epsilon * (1 + unknown):
                break
            keep += 1
        self._wake(sleepers[keep:])

    def _wake(self, closings: Iterable[Closing]) -> None:
        for one in closings:
            self._woken[one.history] = one
            self.wanted.append(one.history)
        self._new = [one for one in self._new if one.history not in self._woken]
        self._asleep = [one for one in self._asleep if one.history not in self._woken]

    def _place_late(self, closings: Iterable[Closing]) -> None:
        """Closings of a hypothesis that was woken late: into those that end there with the same token, or asleep."""
        for one in closings:
            history, is_here = one.history, one.history.end == self.position
            if not self._exact and self._merge(one):
                continue
            if is_here:
                self._new.append(one)
            else:
                one.key = one.logprob - self._log_totals[history.end] - self._surprise[history.end]
                self._asleep.append(one)

    def _merge(self, late: Closing) -> bool:
        end, token_id = late.history.end, late.history.token_id
        for awake in self._awake:
            other = awake.history
            if other is not None and other.end == end and other.token_id == token_id:
                awake.logprob = float(np.logaddexp(awake.logprob, late.logprob))
                return True
        for one in (*self._new, *self._asleep, *self._woken.values()):
            if one.history.end == end and one.history.token_id == token_id:
                gain = float(np.logaddexp(one.logprob, late.logprob)) - one.logprob
                one.logprob, one.key = one.logprob + gain, one.key + gain
                return True
        return False


def _begun(history: History | None, logprob: float, distribution: Distribution) -> Hypothesis:
    """A hypothesis with nothing pending."""
    root = distribution.order.root
    return Hypothesis(history, logprob, distribution, root, distribution.masses(root), 0.0)


def _step(hypothesis: Hypothesis, byte: int, position: int, closings: list[Closing]) -> bool:
    """One more byte is pending, the text has `position` of them now. Adds the tokens that may have ended here to
    `closings`. -> whether a longer token is possible."""
    node = hypothesis.node.child(byte)
    if node is None:
        return False
    distribution, parent = hypothesis.distribution, hypothesis.history
    for place in range(node.lo, node.eq):
        logprob = hypothesis.logprob + distribution.logprob(place)
        if logprob > -math.inf:
            token_id = int(distribution.order.ids[place])
            length = 1 if parent is None else parent.length + 1
            closings.append(Closing(History(parent, token_id, position, length), logprob))
    hypothesis.node = node
    hypothesis.masses = distribution.masses(node)
    hypothesis.log_mass = log_of(float(hypothesis.masses.sum()))
    return hypothesis.log_mass > -math.inf


def _recombined(closings: list[Closing]) -> list[Closing]:
    """One for each last token, with the heaviest history and the weight of all. They end at the same byte."""
    if len(closings) < 2:
        return closings
    by_token: dict[int, Closing] = {}
    for one in sorted(closings, key=lambda one: -one.logprob):
        first = by_token.setdefault(one.history.token_id, one)
        if first is not one:
            first.logprob = float(np.logaddexp(first.logprob, one.logprob))
    return list(by_token.values())


def _log_sum(values: Iterable[float]) -> float:
    values = list(values)
    best = max(values, default=-math.inf)
    if best == -math.inf:
        return best
    return best + math.log(sum(math.exp(value - best) for value in values))
