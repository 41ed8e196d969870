"""Alternatives to a piece against the enumeration of all covers, on random models over tiny vocabularies."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import effective_weights, following, pool
from ensemble_server.ensembles.spelling import END, utf8
from ensemble_server.server.engines.transformers_engine.byte_lookahead import Lookahead, Scored
from ensemble_server.server.engines.transformers_engine.byte_pool import BytePool
from ensemble_server.server.weights.spelled_vocabulary import SpelledVocabulary
from tests.ensembles.spelling.enumeration import RandomModel, random_text, random_vocabulary

ALPHABET = b"abc"
WEIGHTS = {"arithmetic": (1, 2), "posterior": (1, 2), "geometric": (1.5, -0.5)}


class Setting:
    """Two members of vocabularies of their own behind a short text that both have read."""

    def __init__(self, name: str, seed: int, *, epsilon: float = 0.0, exact: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.text = random_text(rng, ALPHABET, 3)
        self.models = [RandomModel(random_vocabulary(rng, ALPHABET, 8), seed=10 * seed + k) for k in range(2)]
        weights = WEIGHTS[name]
        self.mixture = Mixture({"one": weights[0], "two": weights[1]}, name, 0.1 if name == "posterior" else 0.0)
        prior = effective_weights(list(weights))
        self.pool = BytePool(self.mixture, prior, following.start(prior, self.mixture.share))
        self.lattices = [model.lattice(epsilon=epsilon, exact=exact) for model in self.models]
        for model, lattice in zip(self.models, self.lattices, strict=True):
            model.read(lattice, self.text)
        surface = self.models[0]
        self.vocabulary = SpelledVocabulary([*surface.tokens, b""], surface.order)
        self.expected = cache(self.expected)

    def look_ahead(self, **options: int) -> Lookahead:
        ahead = Lookahead(self.lattices, self.pool, self.vocabulary, utf8.START, **options)
        while ahead.is_waiting:
            k, history = ahead.wanted[0]
            ahead.give(k, history, self.models[k].distribution(tuple(history.tokens())))
        return ahead

    def row(self, data: bytes, weights: np.ndarray) -> tuple[torch.Tensor, list[np.ndarray]]:
        rows = [model.row(self.text + data) for model in self.models]
        stacked = torch.from_numpy(np.stack(rows))[:, None]
        return pool(self.mixture.pool, stacked, torch.from_numpy(weights)[:, None])[0], rows

    def expected(self, data: bytes | None) -> tuple[float, list[float]]:
        """By enumeration: under the pool, and under each member."""
        state, total, of_members = self.pool.state, 0.0, np.zeros(2)
        for place, symbol in enumerate((END,) if data is None else data):
            pooled, rows = self.row((data or b"")[:place], following.member_weights(state, self.mixture.share))
            given = [row[symbol] for row in rows]
            total, of_members = total + float(pooled[symbol]), of_members + given
            if self.mixture.pool == "posterior":
                state = following.update(state, given, self.pool.prior, self.mixture.share)
        return total, of_members.tolist()

    def scored(self, data: bytes | None) -> Scored:
        return Scored(data, *self.expected(data))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", WEIGHTS)
def test_alternatives_have_the_probability_of_all_their_covers(name, seed):
    setting = Setting(name, seed)
    ahead = setting.look_ahead(num_top=6, num_of_members=3)
    chosen = setting.scored(setting.models[0].tokens[0])
    num_longer = 0
    for member in (None, 0, 1):
        for one in ahead.listed(chosen, 6 if member is None else 3, member):
            logprob, of_members = setting.expected(one.data)
            assert one.logprob == pytest.approx(logprob, abs=1e-9)
            assert list(one.members) == pytest.approx(of_members, abs=1e-9)
            num_longer += one.data is not None and len(one.data) > 1
    assert num_longer


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_listed_excludes_each_other_and_comes_in_order(name, seed):
    setting = Setting(name, seed, epsilon=0.01, exact=False)
    ahead = setting.look_ahead(num_top=20, num_of_members=20)
    for token in {token for token in setting.models[0].tokens if len(token) < 4}:
        chosen = setting.scored(token)
        for member in (None, 0, 1):
            listed = ahead.listed(chosen, 20, member)
            assert chosen in listed
            ends = [lattice.may_begin_here for lattice in setting.lattices]
            can_end = all(ends) if member is None else ends[member]
            assert any(one.data is None for one in listed) or not can_end
            worth = [one.logprob if member is None else one.members[member] for one in listed]
            assert worth == sorted(worth, reverse=True)
            units = [one.data for one in listed if one.data is not None]
            assert not any(a.startswith(b) for a in units for b in units if a is not b)
            assert all(unit in setting.models[0].tokens for unit in units)
            exact = [setting.expected(one.data) for one in listed]
            total = sum(math.exp(pooled if member is None else own[member]) for pooled, own in exact)
            assert total <= 1 + 1e-9
    assert [one.data for one in ahead.listed(setting.scored(b"a"), 2)] == [
        one.data for one in ahead.listed(setting.scored(b"a"), 20)[:2]
    ]


def test_beginnings_are_shared_and_only_what_lies_beyond_one_token_wants_forwards():
    """One member whose candidates are all its own tokens, at epsilon 1: nothing that sleeps is looked at."""
    model = RandomModel([b"a", b"b", b"ab", b"aba"], seed=1)
    pooling = BytePool(Mixture({"one": 1}), np.ones(1), np.ones(1))
    vocabulary = SpelledVocabulary([*model.tokens, b""], model.order)
    lattice = model.lattice(epsilon=1.0)
    assert not Lookahead([lattice], pooling, vocabulary, utf8.START, num_top=4).is_waiting
    assert not lattice.text and not lattice.wanted
    curious = [RandomModel(model.tokens, seed=seed).lattice(epsilon=1e-6) for seed in range(8)]
    looking = [Lookahead([one], pooling, vocabulary, utf8.START, num_top=4).is_waiting for one in curious]
    assert any(looking)
    assert not any(one.text or one.wanted for one in curious)


def test_no_alternative_breaks_a_character():
    model = RandomModel(["é".encode(), b"\xc3", b"\xa9", b"a", "éa".encode()], seed=3)
    pooling = BytePool(Mixture({"one": 1}), np.ones(1), np.ones(1))
    vocabulary = SpelledVocabulary([*model.tokens, b""], model.order)
    ahead = Lookahead([model.lattice(epsilon=1.0)], pooling, vocabulary, utf8.START, num_top=8)
    listed = [one.data for one in ahead.listed(Scored(b"a", -1.0, [-1.0]), 8)]
    assert b"\xa9" not in listed and len(listed) > 2
    within = Lookahead([model.lattice(epsilon=1.0)], pooling, vocabulary, utf8.state_after(b"\xc3"), num_top=8)
    assert {one.data for one in within.listed(Scored(b"\xa9", -1.0, [-1.0]), 8)} == {b"\xa9", None}


def test_a_member_that_cannot_write_the_text_has_no_say():
    setting = Setting("arithmetic", 1)
    whole = setting.look_ahead(num_top=4)
    setting.lattices[1] = None
    ahead = setting.look_ahead(num_top=4)
    alone = BytePool(Mixture({"one": 1}), np.ones(1), np.ones(1))
    setting.lattices, setting.pool = setting.lattices[:1], alone
    only = setting.look_ahead(num_top=4)
    chosen = Scored(b"a", -1.0, [-1.0, -1.0])
    listed = [(one.data, one.logprob) for one in ahead.listed(chosen, 4)]
    assert listed == [(one.data, pytest.approx(one.logprob, abs=1e-12)) for one in only.listed(chosen, 4)]
    assert listed != [(one.data, one.logprob) for one in whole.listed(chosen, 4)]
