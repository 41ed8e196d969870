"""Targets against what can be worked out by hand, and against whole distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.pooling import arithmetic, posterior
from ensemble_server.server.distill.records import condensed
from ensemble_server.server.distill.targets import (
    avg_ce_weights,
    cross_entropies,
    fused,
    min_ce_weights,
    pool_weights,
)
from tests.server.distill.test_records import distributions

# Two members on one position of five tokens; member 0 likes token 0, member 1 token 1.
PROBS = torch.tensor([[[0.5, 0.3, 0.1, 0.06, 0.04]], [[0.1, 0.5, 0.04, 0.06, 0.3]]])


def test_a_mixture_is_the_weighted_mean_on_what_is_kept_and_on_the_rest() -> None:
    target = fused(condensed(PROBS.log(), torch.tensor([0]), top_k=2), np.array([[0.75], [0.25]]))
    assert target.ids.tolist() == [[0, 1, 4]]
    # 0.75 · (0.5, 0.3, 0.04) + 0.25 · (0.1, 0.5, 0.3); the rest 0.75 · 0.16 + 0.25 · 0.10
    assert target.probs == pytest.approx(np.array([[0.4, 0.35, 0.105]]), abs=5e-4)
    assert target.tail == pytest.approx(np.array([0.145]), abs=5e-4)


def test_without_a_tail_each_member_is_cut_off_and_renormalised_before_the_mean() -> None:
    target = fused(condensed(PROBS.log(), torch.tensor([0]), top_k=2), np.array([[0.75], [0.25]]), only_top=2)
    # 0.75 · (0.5, 0.3, 0) / 0.8 + 0.25 · (0, 0.5, 0.3) / 0.8: what FuseLLM's softmax over the likeliest logits gives
    assert target.probs == pytest.approx(np.array([[0.46875, 0.4375, 0.09375]]), abs=5e-4)
    assert target.tail.tolist() == [0.0]


def test_targets_sum_to_one() -> None:
    record = condensed(distributions(3, 20, 100), torch.arange(20), top_k=7)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 20).T
    for only_top in (None, 7, 2):
        target = fused(record, weights, only_top=only_top)
        assert target.probs.sum(-1) + target.tail == pytest.approx(np.ones(20), abs=1e-5)


def test_a_posterior_mixture_is_what_the_pool_gives_at_every_token() -> None:
    logprobs, targets = distributions(3, 12, 60), torch.arange(12)
    mixture = Mixture({"a": 1.0, "b": 2.0, "c": 1.0}, "posterior", 0.05)
    record = condensed(logprobs, targets, top_k=60)
    weights = pool_weights(mixture, record.of_tokens)
    prior = np.array([0.25, 0.5, 0.25])
    path = posterior.track(prior, record.of_tokens.astype(float), prior, 0.05)[:, :-1]
    pooled = arithmetic.pool(logprobs, torch.from_numpy(path).float()).exp().numpy()
    target = fused(record, weights)
    found = np.zeros_like(pooled)
    np.put_along_axis(found, target.ids, target.probs, axis=1)
    assert found == pytest.approx(pooled, abs=1e-3)
    assert weights[:, 0] == pytest.approx(prior)


def test_a_geometric_pool_is_its_own_row() -> None:
    weights = pool_weights(Mixture({"a": 1.0, "b": -0.5}, "geometric"), np.zeros((3, 4)))
    assert weights.tolist() == [[0.0] * 4, [0.0] * 4, [1.0] * 4]


def test_cross_entropies_are_means_over_tokens_windows_and_documents() -> None:
    of_tokens = [np.array([[-1.0, -2.0, -3.0], [-4.0, -4.0, -4.0]]), np.array([[-5.0, -7.0], [-2.0, -4.0]])]
    documents = [np.array([0, 1, 1]), np.array([1, 2])]
    token, window, document = (
        cross_entropies(of_tokens, documents, level) for level in ("token", "window", "document")
    )
    assert [one.tolist() for one in token] == [[[1, 2, 3], [4, 4, 4]], [[5, 7], [2, 4]]]
    assert [one.tolist() for one in window] == [[[2, 2, 2], [4, 4, 4]], [[6, 6], [3, 3]]]
    # document 0: 1 | 4; document 1: (2 + 3 + 5) / 3 | (4 + 4 + 2) / 3; document 2: 7 | 4
    ten_thirds = 10 / 3
    assert document[0] == pytest.approx(np.array([[1, ten_thirds, ten_thirds], [4, ten_thirds, ten_thirds]]))
    assert document[1] == pytest.approx(np.array([[ten_thirds, 7], [ten_thirds, 4]]))


def test_tokens_before_the_scored_ones_count_in_no_document() -> None:
    found = cross_entropies([np.array([[-9.0, -1.0, -3.0]])], [np.array([0, 0])], "document")
    assert found[0].tolist() == [[2, 2, 2]]


def test_min_ce_takes_the_best_member_and_the_first_of_equal_ones() -> None:
    assert min_ce_weights(np.array([[2.0, 1.0, 3.0], [2.0, 4.0, 1.0]])).tolist() == [[1, 1, 0], [0, 0, 1]]


def test_avg_ce_is_a_softmax_of_rewards_that_lie_close_together() -> None:
    weights = avg_ce_weights(np.array([[1.0], [3.0]]))
    rewards = np.exp([-1.0, -3.0])  # 0.368 and 0.050
    expected = np.exp(rewards) / np.exp(rewards).sum()
    assert weights[:, 0] == pytest.approx(expected)
    assert weights[0, 0] == pytest.approx(0.5788, abs=1e-4)  # nearly uniform, though CE differs by two nats
