"""The lattice against the enumeration of all covers, and what it does with what it does not look at."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest

from ensemble_server.ensembles.spelling import END
from ensemble_server.ensembles.spelling.lattice import Lattice
from tests.ensembles.spelling.enumeration import RandomModel, random_text, random_vocabulary, trained_tokens

EXACT_NATS = 1e-9
NUM_CASES = 8


def difference(rows: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in nats; bytes that cannot come must be the same ones."""
    is_possible = expected > -math.inf
    assert ((rows > -math.inf) == is_possible).all()
    return float(np.abs(rows[is_possible] - expected[is_possible]).max())


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(np.exp(one) - np.exp(other)).sum() / 2)


@cache
def models() -> list[tuple[RandomModel, bytes]]:
    """Models and texts: random vocabularies with duplicates, multi-byte characters, a trained one."""
    cases = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        alphabet = b"abc" if seed % 2 else "é数".encode()
        tokens = random_vocabulary(rng, bytes(sorted(set(alphabet))), 6 + 2 * seed)
        cases.append((RandomModel(tokens, seed=seed), random_text(rng, alphabet, 6)))
    cases.append((RandomModel(trained_tokens(), seed=7), b"the oth"))
    cases.append((RandomModel(trained_tokens(), seed=8), "né 数".encode()))
    return cases


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_epsilon_zero_is_the_enumeration_of_all_covers(case):
    model, text = models()[case]
    lattice = model.lattice(epsilon=0.0, exact=True)
    for end in range(len(text) + 1):
        assert difference(lattice.row(), model.row(text[:end])) < EXACT_NATS
        assert lattice.log_total == pytest.approx(math.log(model.mass(text[:end])), abs=EXACT_NATS)
        assert lattice.log_end() == pytest.approx(lattice.row()[END], abs=EXACT_NATS)
        if end < len(text):
            lattice.feed(text[end])
            model.supply(lattice)
            before = math.log(model.mass(text[:end]))
            assert lattice.evidence == pytest.approx(math.log(model.mass(text[: end + 1])) - before, abs=EXACT_NATS)


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_exact_rows_are_within_epsilon_in_total_variation(case, epsilon):
    model, text = models()[case]
    lattice = model.lattice(epsilon=epsilon, exact=True)
    for end in range(len(text) + 1):
        assert total_variation(lattice.row(), model.row(text[:end])) <= epsilon + 1e-12
        if end < len(text):
            lattice.feed(text[end])
            model.supply(lattice)


def test_rows_sum_to_one_and_do_not_depend_on_the_order_of_ids():
    rng = np.random.default_rng(0)
    tokens = random_vocabulary(rng, b"ab", 8)
    model = RandomModel(tokens, seed=1)
    lattice = model.lattice()
    text = random_text(rng, b"ab", 30)
    for byte in text:
        assert np.exp(lattice.row()).sum() == pytest.approx(1, abs=1e-12)
        lattice.feed(byte)
        model.supply(lattice)


def test_the_text_ends_only_where_a_token_ends():
    model = RandomModel([b"aa", b"b"], seed=0)
    lattice = model.lattice(epsilon=0.0)
    assert lattice.row()[END] > -math.inf
    model.read(lattice, b"a")
    assert lattice.row()[END] == -math.inf == lattice.log_end()
    model.read(lattice, b"a")
    assert lattice.row()[END] > -math.inf


def test_every_closing_is_evidence_though_most_of_them_sleep():
    """The evidence telescopes, and loses next to nothing: its sum stays close to log P(text)."""
    losses = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        model = Markov(random_vocabulary(rng, b"abc", 12), seed=seed, scale=3.0)
        text = random_text(rng, b"abc", 11)
        lattice = model.lattice()
        evidence = model.read(lattice, text)
        assert sum(evidence) == pytest.approx(lattice.log_total, abs=1e-9)
        assert min(evidence) > -math.inf
        losses.append(math.log(model.mass(text)) - lattice.log_total)
    assert min(losses) > -1e-9  # recombination is exact where the last token tells all that follows
    assert np.mean(losses) / 11 < 0.01  # nats per byte


def test_few_distributions_are_asked_for_where_one_way_to_spell_is_likely():
    tokens = [b"a", b"b", b"c", b"ab", b"abc", b"bc"]
    model = Sure(tokens, favourite=b"abc")
    lattice = model.lattice()
    asked = model.num_asked
    model.read(lattice, b"abc" * 20)
    assert model.num_asked - asked == 20


class Markov(RandomModel):
    """What follows depends on the last token alone."""

    def probs(self, history: tuple[int, ...]) -> np.ndarray:
        return super().probs(history[-1:])


class Sure(RandomModel):
    """Almost always goes on with one token, whatever came before."""

    def __init__(self, tokens: list[bytes], favourite: bytes, others: float = 1e-4) -> None:
        super().__init__(tokens, seed=0)
        self._favourite, self._others = tokens.index(favourite), others

    def probs(self, history: tuple[int, ...]) -> np.ndarray:
        probs = np.full(len(self.tokens) + 1, self._others)
        probs[self._favourite] = 1 - probs.sum() + self._others
        return probs


class LookingAhead(RandomModel):
    """As a pretokenizer cuts: before a letter two newlines stand as two tokens, elsewhere as one."""

    def __init__(self) -> None:
        super().__init__([b"\n", b"\n\n", b"x", b"y"], seed=0)

    def probs(self, history: tuple[int, ...]) -> np.ndarray:
        one, two = self.tokens.index(b"\n"), self.tokens.index(b"\n\n")
        is_single = history[-1:] == (one,)
        probs = np.full(5, 1e-7 if history[-1:] == (two,) else 1e-3)
        probs[self.tokens.index(b"x") if is_single else self.end_id if history[-1:] == (two,) else two] = 1.0
        if not history:
            probs[one] = 0.005  # sleeps where it arises
        return probs / probs.sum()


def test_a_sleeper_is_looked_at_when_the_text_surprises():
    model = LookingAhead()
    lattice = model.lattice()
    evidence = model.read(lattice, b"\n")
    evidence += model.read(lattice, b"x")
    assert [model.tokens[i] for i in lattice.settled().tokens()] == [b"\n", b"x"]
    assert sum(evidence) == pytest.approx(math.log(model.mass(b"\nx")), abs=0.01)


def test_the_same_tokens_cut_otherwise_come_back_too():
    """Both newlines as one token are all but certain; what follows says that they were two."""
    model = LookingAhead()
    lattice = model.lattice()
    total = sum(model.read(lattice, b"\n\nx"))
    assert total == pytest.approx(math.log(model.mass(b"\n\nx")), abs=0.1)


def test_whatever_happens_some_way_to_spell_is_found():
    """Adversarial text: every next byte is the one that the row holds least likely."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        model = RandomModel(random_vocabulary(rng, b"abcd", 15), seed=seed, scale=4.0)
        lattice = model.lattice()
        for _ in range(40):
            row = lattice.row()[list(b"abcd")]
            lattice.feed(b"abcd"[int(row.argmin())])
            model.supply(lattice)
            assert not lattice.is_dead
            assert lattice.evidence > -math.inf


def test_a_text_that_no_tokens_spell_ends_the_lattice():
    model = RandomModel([b"a", b"ab"], seed=0)
    lattice = model.lattice()
    model.read(lattice, b"aac")
    assert lattice.is_dead
    assert lattice.evidence == -math.inf
    assert (lattice.row() == -math.inf).all()


def test_a_lattice_begins_anew_wherever_a_distribution_is_known():
    """After `aac`, which it cannot write, a member goes on from its own reading of that text."""
    model = RandomModel([b"a", b"ab"], seed=0)
    anew = Lattice(model.distribution((0, 0)), epsilon=0.0, exact=True)
    for byte in b"aab":
        probs = np.exp(anew.row())
        assert probs.sum() == pytest.approx(1)
        anew.feed(byte)
        while anew.wanted:
            history = anew.wanted[0]
            anew.give(history, model.distribution((0, 0, *history.tokens())))
    expected = sum(
        math.prod(model.probs((0, 0, *tokens[:i]))[tokens[i]] for i in range(len(tokens)))
        for tokens in ((0, 1), (0, 0, 0), (1,))
        if b"".join(model.tokens[i] for i in tokens) == b"aab"
    )
    assert anew.log_total == pytest.approx(math.log(expected), abs=EXACT_NATS)


def test_a_copy_goes_its_own_way():
    model = RandomModel([b"a", b"b", b"ab", b"ba"], seed=3)
    lattice = model.lattice()
    model.read(lattice, b"ab")
    row, twin = lattice.row(), lattice.fork()
    model.read(twin, b"bbba")
    assert (lattice.row() == row).all()
    assert bytes(lattice.text) == b"ab"
    again = model.lattice()
    model.read(again, b"abbbba")
    assert twin.row() == pytest.approx(again.row())


def test_tokens_that_all_hypotheses_share_are_settled():
    model = Sure([b"a", b"b", b"ab"], favourite=b"ab", others=1e-3)
    lattice = model.lattice()
    model.read(lattice, b"ab")
    model.read(lattice, b"ab")
    assert [model.tokens[i] for i in lattice.settled().tokens()] == [b"ab", b"ab"]
    assert lattice.heaviest() is lattice.settled()
    model.read(lattice, b"a")
    assert [model.tokens[i] for i in lattice.heaviest().tokens()][:2] == [b"ab", b"ab"]


def test_histories_that_end_with_the_same_token_are_one():
    """Every split of the text ends with b"x"; none of them wants a distribution of its own after that."""
    model = RandomModel([b"a", b"aa", b"x"], seed=5, scale=0.1)
    lattice = model.lattice()
    model.read(lattice, b"aaaa")
    num_before = lattice.num_awake
    model.read(lattice, b"x")
    assert num_before > 1
    assert lattice.num_awake == 1


def test_any_cut_of_a_text_into_pieces_has_the_same_sum():
    rng = np.random.default_rng(2)
    model = RandomModel(random_vocabulary(rng, b"abc", 10), seed=2)
    text = random_text(rng, b"abc", 24)
    evidence = np.array(model.read(model.lattice(), text))
    for cuts in itertools.islice(itertools.combinations(range(1, 24), 3), 0, None, 97):
        pieces = [part.sum() for part in np.split(evidence, cuts)]
        assert sum(pieces) == pytest.approx(evidence.sum(), abs=1e-9)
