from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ensemble_server.ensembles.pooling import effective_weights, posterior

Text = tuple[np.ndarray, np.ndarray]


@st.composite
def texts(draw: st.DrawFn, *, impossible: bool = False) -> Text:
    """Prior (K,) and what each member gave each token of a text (K, T), nats; some -inf if asked for."""
    members, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logprobs = -random.exponential(draw(st.sampled_from([0.1, 3, 200])), (members, tokens))
    if impossible:
        logprobs[random.random(logprobs.shape) < 0.3] = -math.inf
    return effective_weights(random.uniform(0.01, 10, members)), logprobs


def loss(prior: np.ndarray, logprobs: np.ndarray, share: float) -> float:
    """What the pool loses on the text (nats): -Σ_t log Σ_k w_k(t) p_k(x_t)."""
    path = posterior.track(prior, logprobs, prior, share)
    with np.errstate(divide="ignore"):
        return -float(np.logaddexp.reduce(np.log(path[:, :-1]) + logprobs, axis=0).sum())


def at_most(bound: float) -> float:
    return bound + 1e-9 * abs(bound) + 1e-9


def test_plain_bayes_worked_out_by_hand() -> None:
    # 1/2 · 0.8 : 1/2 · 0.2 = 4/5 : 1/5;   then 4/5 · 0.5 : 1/5 · 0.25 = 8/9 : 1/9
    prior = effective_weights([1, 1])
    first = posterior.update(prior, np.log([0.8, 0.2]), prior, 0)
    assert first == pytest.approx([4 / 5, 1 / 5])
    assert posterior.update(first, np.log([0.5, 0.25]), prior, 0) == pytest.approx([8 / 9, 1 / 9])


def test_fixed_share_worked_out_by_hand() -> None:
    # prior 3/4, 1/4; evidence 0.1 and 0.9 makes 0.075 : 0.225 = 1/4 : 3/4; a fifth returns to the prior:
    # 4/5 · 1/4 + 1/5 · 3/4 = 7/20 and 4/5 · 3/4 + 1/5 · 1/4 = 13/20
    prior = effective_weights([3, 1])
    assert posterior.update(prior, np.log([0.1, 0.9]), prior, 0.2) == pytest.approx([7 / 20, 13 / 20])


def test_the_path_holds_the_weights_before_each_token_and_after_the_last() -> None:
    prior = effective_weights([1, 1])
    logprobs = np.log([[0.8, 0.5], [0.2, 0.25]])
    path = posterior.track(prior, logprobs, prior, 0)
    assert path == pytest.approx(np.array([[1 / 2, 4 / 5, 8 / 9], [1 / 2, 1 / 5, 1 / 9]]))


@given(texts(impossible=True), st.floats(0, 0.9))
def test_weights_stay_a_distribution(text: Text, share: float) -> None:
    prior, logprobs = text
    path = posterior.track(prior, logprobs, prior, share)
    assert (path >= 0).all()
    assert path.sum(0) == pytest.approx(1)


@given(texts())
@example((effective_weights([1, 1]), np.array([[-1.0] * 900 + [-2.0] * 1000, [-2.0] * 900 + [-1.0] * 1000])))
def test_without_share_the_loss_is_within_ln_k_of_the_best_member(text: Text) -> None:
    """The example: one member leads by 900 nats, more than float64 can hold as a ratio, and loses the lead again."""
    _, logprobs = text
    uniform = effective_weights([1] * len(logprobs))
    best = -logprobs.sum(1).max()
    assert loss(uniform, logprobs, 0) <= at_most(best + math.log(len(logprobs)))


@given(texts(), st.floats(0, 0.9))
def test_the_loss_keeps_the_stated_bound_to_every_member(text: Text, share: float) -> None:
    prior, logprobs = text
    pooled = loss(prior, logprobs, share)
    for weight, member in zip(prior, logprobs, strict=True):
        assert pooled <= at_most(-member.sum() + posterior.loss_bound(weight, len(member), share))


@given(texts(), st.floats(0.001, 0.9), st.data())
def test_with_share_the_loss_keeps_the_stated_bound_to_any_sequence_of_members(
    text: Text, share: float, data: st.DataObject
) -> None:
    prior, logprobs = text
    num_members, num_tokens = logprobs.shape
    sequence = data.draw(st.lists(st.integers(0, num_members - 1), min_size=num_tokens, max_size=num_tokens))
    switches = sum(a != b for a, b in pairwise(sequence))
    followed = -sum(logprobs[member, t] for t, member in enumerate(sequence))
    weakest = prior.min()
    bound = posterior.loss_bound(weakest, num_tokens, share) - switches * math.log(share * weakest)
    assert loss(prior, logprobs, share) <= at_most(followed + bound)


def test_share_brings_back_a_member_that_plain_bayes_has_given_up() -> None:
    prior = effective_weights([1, 1])
    logprobs = np.array([[-0.1] * 50 + [-5.0] * 5, [-5.0] * 50 + [-0.1] * 5])
    assert posterior.track(prior, logprobs, prior, 0.0)[1, -1] < 1e-6
    assert posterior.track(prior, logprobs, prior, 0.01)[1, -1] > 0.9


def test_a_token_that_all_rule_out_says_nothing() -> None:
    weights, prior = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    assert np.array_equal(posterior.update(weights, [-math.inf, -math.inf], prior, 0.1), weights)


def test_a_member_that_ruled_out_what_was_said_loses_its_weight() -> None:
    prior = effective_weights([1, 1])
    assert posterior.update(prior, [-math.inf, -9.0], prior, 0) == pytest.approx([0, 1])


@given(texts(), st.floats(0, 0.5))
def test_weight_zero_is_absence(text: Text, share: float) -> None:
    prior, logprobs = text
    with_stranger = posterior.track(
        np.append(prior, 0), np.vstack([logprobs, np.zeros(logprobs.shape[1])]), np.append(prior, 0), share
    )
    assert (with_stranger[-1] == 0).all()
    assert with_stranger[:-1] == pytest.approx(posterior.track(prior, logprobs, prior, share), abs=1e-9)


@given(texts(), st.floats(0, 0.9))
def test_members_that_say_the_same_keep_their_prior_weights(text: Text, share: float) -> None:
    prior, logprobs = text
    same = np.repeat(logprobs[:1], len(prior), axis=0)
    path = posterior.track(prior, same, prior, share)
    assert path == pytest.approx(np.repeat(prior[:, None], same.shape[1] + 1, axis=1))


def test_the_bound_worked_out_by_hand() -> None:
    assert posterior.loss_bound(1 / 4, 100, 0.0) == pytest.approx(math.log(4))
    # ln 4 + 2 · ln 1/(0.9 + 0.1/4) for three tokens
    assert posterior.loss_bound(1 / 4, 3, 0.1) == pytest.approx(math.log(4) - 2 * math.log(0.925))


@given(st.lists(texts(impossible=True), min_size=1, max_size=3), st.sampled_from([0.0, 0.05]))
def test_rows_are_updated_as_single_texts_are(rows: list[Text], share: float) -> None:
    members = min(len(prior) for prior, _ in rows)
    tokens = min(logprobs.shape[1] for _, logprobs in rows)
    priors = torch.from_numpy(np.stack([effective_weights(prior[:members]) for prior, _ in rows]))
    logprobs = torch.from_numpy(np.stack([logprobs[:members, :tokens] for _, logprobs in rows]))
    weights = priors
    for t in range(tokens):
        weights = posterior.update_rows(weights, logprobs[..., t], priors, share)
    expected = [
        posterior.track(p.numpy(), row.numpy(), p.numpy(), share)[:, -1]
        for p, row in zip(priors, logprobs, strict=True)
    ]
    np.testing.assert_allclose(weights.numpy(), np.stack(expected), rtol=1e-9, atol=1e-300)


@given(texts())
def test_likelihoods_of_whole_texts_give_the_weights_that_updates_give(text: Text) -> None:
    prior, logprobs = text
    # Further apart than that the smaller weight has no float64, and one update after the other forgets how far it fell.
    assume(np.ptp(np.cumsum(logprobs, axis=1), axis=0).max() < 500)
    closed = posterior.weights_of(torch.from_numpy(logprobs.sum(1)), torch.from_numpy(prior))
    np.testing.assert_allclose(closed.numpy(), posterior.track(prior, logprobs, prior, 0.0)[:, -1], atol=1e-9)
