from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from ensemble_server.ensembles.pooling.disagreement import entropy, jensen_shannon


@st.composite
def opinions(draw: st.DrawFn) -> torch.Tensor:
    """(K, V) log-probabilities"""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(scale=draw(st.sampled_from([0.1, 3, 30])), size=(draw(st.integers(1, 4)), 6))
    return torch.log_softmax(torch.tensor(logits, dtype=torch.float32), -1)


def test_entropy_of_a_fair_coin_is_ln_2() -> None:
    assert entropy(torch.tensor([0.5, 0.5]).log()).item() == pytest.approx(math.log(2))


def test_certainty_has_no_entropy_also_beside_impossible_tokens() -> None:
    assert entropy(torch.tensor([0.0, -torch.inf, -torch.inf])).item() == 0


@given(opinions())
def test_entropy_is_that_of_scipy(logprobs: torch.Tensor) -> None:
    expected = scipy_entropy(logprobs.double().exp().numpy(), axis=-1)
    assert entropy(logprobs).numpy() == pytest.approx(expected, abs=1e-5)


def test_members_with_nothing_in_common_are_ln_k_apart() -> None:
    assert jensen_shannon(torch.eye(3).log(), torch.ones(3)) == pytest.approx(math.log(3))


def test_two_members_are_as_far_apart_as_scipy_finds() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    assert jensen_shannon(probs.log(), torch.ones(2)) == pytest.approx(jensenshannon(*probs.numpy()) ** 2, abs=1e-6)


@given(opinions(), st.data())
def test_the_divergence_is_at_most_the_entropy_of_the_weights(logprobs: torch.Tensor, data: st.DataObject) -> None:
    weights = torch.tensor(data.draw(st.lists(st.floats(0, 4), min_size=len(logprobs), max_size=len(logprobs))))
    weights[0] += 1
    divergence = jensen_shannon(logprobs, weights)
    assert 0 <= divergence <= scipy_entropy(weights.numpy()) + 1e-4


@given(opinions())
def test_members_that_agree_are_not_apart(logprobs: torch.Tensor) -> None:
    assert jensen_shannon(logprobs[:1].repeat(3, 1), torch.tensor([1.0, 2.0, 0.5])) == pytest.approx(0, abs=1e-5)


def test_negative_weights_count_by_their_size() -> None:
    logprobs = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log()
    contrast = jensen_shannon(logprobs, torch.tensor([1.0, -0.5]))
    assert contrast == pytest.approx(jensen_shannon(logprobs, torch.tensor([1.0, 0.5])))
    assert contrast > 0
