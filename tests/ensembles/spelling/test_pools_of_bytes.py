"""Pools over rows of bytes: members of different vocabularies against the sum over all their covers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.pooling import effective_weights, pool, posterior
from ensemble_server.ensembles.spelling.lattice import Lattice
from tests.ensembles.spelling.enumeration import RandomModel, random_text, random_vocabulary

EXACT_NATS = 1e-9


def members(num: int, seed: int = 0) -> list[RandomModel]:
    rng = np.random.default_rng(seed)
    return [RandomModel(random_vocabulary(rng, b"abc", 5 + 3 * k), seed=seed + k) for k in range(num)]


def pooled(name: str, rows: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    stacked = torch.from_numpy(np.stack(rows))[:, None]
    return pool(name, stacked, torch.tensor(weights, dtype=torch.float64)[:, None])[0].numpy()


def advance(models: Sequence[RandomModel], lattices: Sequence[Lattice], byte: int) -> list[float]:
    for model, lattice in zip(models, lattices, strict=True):
        lattice.feed(byte)
        model.supply(lattice)
    return [lattice.evidence for lattice in lattices]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 1)])
def test_the_arithmetic_pool_is_the_mean_of_the_members_texts(weights):
    models = members(len(weights))
    lattices = [model.lattice(epsilon=0.0, exact=True) for model in models]
    shares = np.array(weights) / sum(weights)
    text = random_text(np.random.default_rng(1), b"abc", 5)
    for end in range(len(text)):
        row = pooled("arithmetic", [lattice.row() for lattice in lattices], weights)
        for byte in b"abc":
            longer = text[:end] + bytes([byte])
            given = [model.mass(longer) / model.mass(text[:end]) for model in models]
            assert row[byte] == pytest.approx(math.log(shares @ given), abs=EXACT_NATS)
        advance(models, lattices, text[end])


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 1)])
def test_the_posterior_pool_without_share_is_one_mixture_of_whole_texts(weights):
    models = members(len(weights), seed=5)
    lattices = [model.lattice(epsilon=0.0, exact=True) for model in models]
    prior = current = effective_weights(weights)
    text = random_text(np.random.default_rng(2), b"abc", 6)

    def flat(data: bytes) -> float:
        return float(prior @ [model.mass(data) for model in models])

    total = 0.0
    for end, byte in enumerate(text):
        row = pooled("posterior", [lattice.row() for lattice in lattices], current)
        assert row[byte] == pytest.approx(math.log(flat(text[: end + 1]) / flat(text[:end])), abs=EXACT_NATS)
        total += row[byte]
        current = posterior.update(current, advance(models, lattices, byte), prior, 0.0)
    assert total == pytest.approx(math.log(flat(text)), abs=EXACT_NATS)


def test_the_geometric_pool_is_renormalised_at_every_byte():
    models = members(3, seed=9)
    lattices = [model.lattice(epsilon=0.0, exact=True) for model in models]
    for byte in b"abca":
        row = pooled("geometric", [lattice.row() for lattice in lattices], (1.0, 1.0, -0.5))
        assert np.exp(row).sum() == pytest.approx(1)
        advance(models, lattices, byte)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("adversary", ["least likely", "worst for the heaviest member"])
def test_the_posterior_pool_loses_no_more_than_its_bound_on_any_text(adversary, share):
    """Whoever writes the text: at most ln K nats (and what the share costs) above the best member, whatever sleeps."""
    models = members(3, seed=3)
    lattices = [model.lattice() for model in models]
    prior = current = effective_weights([1, 1, 1])
    loss, alone = 0.0, np.zeros(3)
    for _ in range(30):
        rows = [lattice.row() for lattice in lattices]
        row = pooled("posterior", rows, current)
        judge = row if adversary == "least likely" else rows[int(current.argmax())]
        byte = min(b"abc", key=lambda letter: judge[letter])
        evidence = np.array(advance(models, lattices, byte))
        loss -= math.log(current @ np.exp(evidence))
        alone -= evidence
        current = posterior.update(current, evidence, prior, share)
    assert loss <= alone.min() + posterior.loss_bound(1 / 3, 30, share) + 1e-9


def test_a_member_of_weight_one_is_that_member_alone():
    models = members(2, seed=11)
    lattices = [model.lattice() for model in models]
    for byte in random_text(np.random.default_rng(4), b"abc", 10):
        rows = [lattice.row() for lattice in lattices]
        for name in ("arithmetic", "posterior", "geometric"):
            row = pooled(name, rows, (1.0, 0.0))
            is_possible = rows[0] > -math.inf
            assert row[is_possible] == pytest.approx(rows[0][is_possible], abs=1e-12)
        advance(models, lattices, byte)


def test_vocabularies_whose_ids_stand_in_another_order_are_one_member():
    """A member and its twin with shuffled ids: the pool of both is the member, whatever the weights."""
    base = members(1, seed=20)[0]
    shuffled = np.random.default_rng(0).permutation(len(base.tokens))

    class Twin(RandomModel):
        def probs(self, history: tuple[int, ...]) -> np.ndarray:
            own = base.probs(tuple(int(shuffled[i]) for i in history))
            return np.append(own[shuffled], own[-1])

    models = [base, Twin([base.tokens[i] for i in shuffled], seed=20)]
    lattices = [model.lattice() for model in models]
    for byte in random_text(np.random.default_rng(5), b"abc", 12):
        rows = [lattice.row() for lattice in lattices]
        assert pooled("arithmetic", rows, (0.3, 0.7)) == pytest.approx(rows[0], abs=1e-12)
        evidence = advance(models, lattices, byte)
        assert evidence[0] == pytest.approx(evidence[1], abs=1e-12)
