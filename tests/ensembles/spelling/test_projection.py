"""What a member expects, in the tokens of another vocabulary: by hand, and against the enumeration of all covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.spelling.byte_order import ByteOrder
from ensemble_server.ensembles.spelling.given_text import GivenText
from ensemble_server.ensembles.spelling.projection import ProjectedText, Projection, TokenTree
from tests.ensembles.spelling.enumeration import random_text, random_vocabulary
from tests.ensembles.spelling.test_given_text import longest_first
from tests.ensembles.spelling.test_lattice import Markov


def projected(model, tree: TokenTree, text: bytes, borders: Sequence[int]) -> list[dict[int, float]]:
    watch = ProjectedText(Projection(model.order, tree), text, borders)
    given = GivenText(model.distribution(()), text, epsilon=0.0, watch=watch)
    given.follow(longest_first(model, text), [*model.tokens, b""])
    while given.wanted:
        for history in list(given.wanted):
            given.give(history, model.distribution(tuple(history.tokens())))
        given.settle()
    assert watch.evidence() == pytest.approx(given.evidence())
    return [dict(zip(ids.tolist(), probs.tolist(), strict=True)) for ids, probs in watch.rows()]


class Same:
    """A member that expects the same after every token."""

    def __init__(self, probs: dict[bytes, float], end: float) -> None:
        self.tokens = list(probs)
        self.order = ByteOrder([*self.tokens, b"</s>"], [len(self.tokens)])
        self._logprobs = torch.tensor([*probs.values(), end], dtype=torch.float64).log()[None]

    def distribution(self, history: tuple[int, ...]):
        return self.order.distributions(self._logprobs)[0]


def test_a_case_worked_out_by_hand() -> None:
    """The member has a, b and abb; the student a, b and ab.

    At the beginning P(a) = 0.4 + 0.3 and P(b) = 0.2. P(ab) is that of abb, and of a then b where the text says what
    follows a. Of "ab": P(ab) = 0.3 + 0.4 · 0.2 = 0.38, so Q(ab) = 0.38, Q(a) = 0.7 - 0.38, Q(b) = 0.2, and END has 0.1.
    Of "b" nobody has asked what follows an a: Q(ab) = 0.3, Q(a) = 0.4, and in truth 0.08 of that is ab's.
    """
    member = Same({b"a": 0.4, b"b": 0.2, b"abb": 0.3}, end=0.1)
    tree = TokenTree([b"a", b"b", b"ab", b""], 3)
    [row] = projected(member, tree, b"ab", [0])
    assert row == pytest.approx({0: 0.32, 1: 0.2, 2: 0.38, 3: 0.1})
    [row] = projected(member, tree, b"b", [0])
    assert row == pytest.approx({0: 0.4, 1: 0.2, 2: 0.3, 3: 0.1})


def test_a_border_may_lie_inside_a_token_of_the_member() -> None:
    """After the a of "abb": of what begins with a, 0.4 went on anew from "a" and 0.3 is inside abb.

    Q(b) = (0.4 · 0.2 + 0.3) / 0.7: behind that b an ab would need an a. Q(a): 0.4 · (0.4 + 0.3) / 0.7, of which
    abb and, off the text, nothing else is ab: 0.4 · 0.3 / 0.7. END can only be where a token ends: 0.4 · 0.1 / 0.7.
    """
    member = Same({b"a": 0.4, b"b": 0.2, b"abb": 0.3}, end=0.1)
    tree = TokenTree([b"a", b"b", b"ab", b""], 3)
    [row] = projected(member, tree, b"abb", [1])
    assert row == pytest.approx({0: 0.4 * 0.4 / 0.7, 1: 0.38 / 0.7, 2: 0.4 * 0.3 / 0.7, 3: 0.04 / 0.7})


@pytest.mark.parametrize("seed", range(3))
def test_of_one_vocabulary_it_sums_to_one_and_gives_what_comes_its_probability(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = Markov(random_vocabulary(rng, b"abc", 8), seed=seed)
    strings = random_vocabulary(rng, b"abc", 8)
    tree = TokenTree([*strings, b""], len(strings))
    text = random_text(rng, b"abc", 7)
    borders = list(range(len(text)))
    for border, row in zip(borders, projected(model, tree, text, borders), strict=True):
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)
        # P of a string that came is the sum of Q over all tokens that begin with it.
        before = model.mass(text[:border])
        for length in range(1, len(text) - border + 1):
            data = text[border : border + length]
            if data in tree.index:
                begun = sum(row.get(i, 0.0) for i, other in enumerate(strings) if other.startswith(data))
                assert begun == pytest.approx(model.mass(text[:border] + data) / before, abs=1e-6)
