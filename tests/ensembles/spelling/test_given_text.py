"""Waves over a text that is there against the enumeration of all covers, and against the lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ensemble_server.ensembles.spelling import END
from ensemble_server.ensembles.spelling.given_text import GivenText
from tests.ensembles.spelling.enumeration import RandomModel, random_text, random_vocabulary
from tests.ensembles.spelling.test_lattice import LookingAhead, Markov, Sure


def longest_first(model: RandomModel, text: bytes) -> list[int]:
    """One way to spell a text: always the longest token."""
    ids = []
    while text:
        ids.append(
            max(
                (i for i, token in enumerate(model.tokens) if text.startswith(token)),
                key=lambda i: len(model.tokens[i]),
            )
        )
        text = text[len(model.tokens[ids[-1]]) :]
    return ids


def read(
    model: RandomModel, text: bytes, path: Sequence[int] | None = None, **options: float
) -> tuple[GivenText, list[int]]:
    """-> the text, read, and how many histories each wave had"""
    given, waves = GivenText(model.distribution(()), text, **options), []
    given.follow(longest_first(model, text) if path is None else path, [*model.tokens, b""])
    while given.wanted:
        waves.append(len(given.wanted))
        for history in list(given.wanted):
            given.give(history, model.distribution(tuple(history.tokens())))
        given.settle()
    return given, waves


@pytest.mark.parametrize("seed", range(5))
def test_epsilon_zero_is_the_enumeration_of_all_covers(seed):
    rng = np.random.default_rng(seed)
    alphabet = b"abc" if seed % 2 else "é数".encode()
    model = Markov(random_vocabulary(rng, bytes(sorted(set(alphabet))), 10), seed=seed)
    text = random_text(rng, alphabet, 7)
    given, _ = read(model, text, epsilon=0.0)
    assert given.evidence().sum() == pytest.approx(math.log(model.mass(text)), abs=1e-9)
    for end, row in enumerate(given.rows()):
        expected = model.row(text[:end])
        is_possible = expected > -math.inf
        assert row[is_possible] == pytest.approx(expected[is_possible], abs=1e-9)
        assert (row[~is_possible] == -math.inf).all()
        assert row[END] == pytest.approx(expected[END], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_the_lattice_that_reads_byte_by_byte(seed):
    rng = np.random.default_rng(seed)
    model = Markov(random_vocabulary(rng, b"abc", 10), seed=seed, scale=3.0)
    text = random_text(rng, b"abc", 60)
    given, _ = read(model, text)
    lattice = model.lattice()
    by_byte = np.array(model.read(lattice, text))
    exact, _ = read(model, text, epsilon=0.0)
    truth = exact.evidence().sum()
    assert 1.02 * truth < given.evidence().sum() <= truth + 1e-9  # of a text that nobody would write
    assert given.evidence().sum() == pytest.approx(by_byte.sum(), rel=0.02)


def test_any_reading_to_begin_with_leads_to_the_same():
    rng = np.random.default_rng(3)
    model = Markov(random_vocabulary(rng, b"ab", 8), seed=3)
    text = random_text(rng, b"ab", 30)
    letters = [model.tokens.index(bytes([byte])) for byte in text]
    one, other = (read(model, text, path, epsilon=0.0)[0] for path in (None, letters))
    assert one.evidence() == pytest.approx(other.evidence(), abs=1e-9)


def test_the_same_tokens_cut_otherwise_are_found_where_the_text_surprises():
    model = LookingAhead()
    given, waves = read(model, b"\n\nx")
    assert given.evidence().sum() == pytest.approx(math.log(model.mass(b"\n\nx")), abs=0.1)
    assert len(waves) > 1


def test_few_histories_are_looked_at():
    model = Sure([b"a", b"b", b"c", b"ab", b"abc", b"bc"], favourite=b"abc")
    given, waves = read(model, b"abc" * 20)
    assert waves == [20]
    assert given.evidence().sum() == pytest.approx(20 * math.log(1 - 6e-4), abs=1e-2)


def test_an_empty_text_has_a_row_and_no_evidence():
    model = RandomModel([b"a"], seed=0)
    given, _ = read(model, b"")
    given.settle()
    assert given.evidence().shape == (0,)
    assert np.exp(given.rows()).sum() == pytest.approx(1)
