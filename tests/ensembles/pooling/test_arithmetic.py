from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.pooling import pool


@st.composite
def opinions(draw: st.DrawFn, max_members: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs (K, B, V), some of them -inf, and weights (K, B), of which at least one per row is positive."""
    members, rows, vocab = draw(st.integers(1, max_members)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(scale=draw(st.sampled_from([0.1, 3, 30])), size=(members, rows, vocab))
    logits[random.random(logits.shape) < draw(st.sampled_from([0, 0.4]))] = -np.inf
    logits[..., 0] = np.maximum(logits[..., 0], -30)  # each member finds something possible
    weights = random.uniform(0, 4, (members, rows)) * (random.random((members, rows)) < 0.8)
    weights[random.integers(members)] += 1
    logprobs = torch.log_softmax(torch.tensor(logits, dtype=torch.float32), -1)
    return logprobs, torch.tensor(weights, dtype=torch.float32)


def arithmetic(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    before = logprobs.clone(), weights.clone()
    pooled = pool("arithmetic", logprobs, weights)
    assert torch.equal(logprobs, before[0]) and torch.equal(weights, before[1]), "inputs must not change"
    assert pooled.dtype == torch.float32
    return pooled


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_case_worked_out_by_hand() -> None:
    # weights 1 and 3 are 1/4 and 3/4:  1/4 · (0.8, 0.2, 0) + 3/4 · (0.4, 0.4, 0.2) = (0.5, 0.35, 0.15)
    logprobs = torch.tensor([[[0.8, 0.2, 0.0]], [[0.4, 0.4, 0.2]]]).log()
    pooled = arithmetic(logprobs, torch.tensor([[1.0], [3.0]]))
    assert close(pooled.exp(), torch.tensor([[0.5, 0.35, 0.15]]))


def test_each_row_has_its_own_weights() -> None:
    logprobs = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.5, 0.5], [0.5, 0.5]]]).log()
    pooled = arithmetic(logprobs, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert close(pooled.exp(), torch.tensor([[0.9, 0.1], [0.5, 0.5]]))


@given(opinions())
def test_it_is_the_weighted_mean_in_float64(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    logprobs, weights = given_
    share = weights.numpy().astype(float)
    share /= share.sum(0)
    expected = np.einsum("kb,kbv->bv", share, np.exp(logprobs.numpy().astype(float)))
    np.testing.assert_allclose(arithmetic(logprobs, weights).double().exp(), expected, rtol=1e-4, atol=1e-12)


@given(opinions())
def test_it_sums_to_one(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    total = arithmetic(*given_).exp().sum(-1)
    assert close(total, torch.ones_like(total))


@given(opinions(), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(given_: tuple[torch.Tensor, torch.Tensor], random: object) -> None:
    logprobs, weights = given_
    order = list(range(len(logprobs)))
    random.shuffle(order)
    assert close(arithmetic(logprobs, weights), arithmetic(logprobs[order], weights[order]))


@given(opinions())
def test_weight_zero_is_absence(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    logprobs, weights = given_
    stranger = torch.log_softmax(torch.randn(1, *logprobs.shape[1:]), -1)
    with_stranger = arithmetic(torch.cat([stranger, logprobs]), torch.cat([torch.zeros_like(weights[:1]), weights]))
    assert close(with_stranger, arithmetic(logprobs, weights))


@given(opinions())
def test_copies_of_one_member_give_that_member(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    logprobs, weights = given_
    assert close(arithmetic(logprobs[:1].repeat(len(weights), 1, 1), weights), logprobs[0])


@given(opinions(), st.sampled_from([0.01, 3.0, 1000.0]))
def test_only_the_ratio_of_weights_matters(given_: tuple[torch.Tensor, torch.Tensor], factor: float) -> None:
    logprobs, weights = given_
    assert close(arithmetic(logprobs, weights * factor), arithmetic(logprobs, weights))


def test_probabilities_below_float32_keep_their_logarithm() -> None:
    logprobs = torch.tensor([[[0.0, -200.0]], [[0.0, -210.0]]])
    # log(1/2 e^-200 + 1/2 e^-210) = -200 - ln 2 + log(1 + e^-10)
    expected = -200 - np.log(2) + np.log1p(np.exp(-10))
    assert arithmetic(logprobs, torch.ones(2, 1))[0, 1].item() == pytest.approx(expected)
