from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.fitting.share import posterior_logprobs
from ensemble_server.ensembles.pooling import effective_weights, following, learned_share, posterior


def text(seed: int, num_members: int, num_tokens: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A prior (K,), and what members that take turns at being good gave each token (K, T), nats."""
    random = np.random.default_rng(seed)
    logprobs = -random.exponential(scale, (num_members, num_tokens))
    good = np.repeat(random.integers(num_members, size=num_tokens // 10 + 1), 10)[:num_tokens]
    logprobs[good, np.arange(num_tokens)] *= 0.2
    return effective_weights(random.uniform(0.1, 5, num_members)), logprobs


def loss(prior: np.ndarray, logprobs: np.ndarray, share: following.Share) -> float:
    return -float(posterior_logprobs(logprobs, prior, share).sum())


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 120), st.sampled_from([0.1, 3.0, 100.0]))
def test_the_loss_is_at_most_ln_6_above_the_best_share_of_the_grid(seed, num_members, num_tokens, scale):
    prior, logprobs = text(seed, num_members, num_tokens, scale)
    best = min(loss(prior, logprobs, share) for share in learned_share.GRID)
    bound = learned_share.loss_bound(num_tokens)
    assert loss(prior, logprobs, "auto") <= best + bound + 1e-9 * (1 + abs(best))
    assert bound <= math.log(6) + 1e-4 * num_tokens


def test_without_a_share_of_shares_it_is_the_bayesian_mixture_of_the_posterior_pools(monkeypatch):
    """Against a slow reference: six pools run on their own, weighed by what each gave the text so far."""
    monkeypatch.setattr(learned_share, "SHARE_OF_SHARES", 0.0)
    prior, logprobs = text(3, 3, 40, 2.0)
    of_pools = np.stack([posterior_logprobs(logprobs, prior, share) for share in learned_share.GRID])  # (G, T)
    evidence = np.concatenate([np.zeros((6, 1)), of_pools.cumsum(axis=1)[:, :-1]], axis=1)
    weights = np.exp(evidence - np.logaddexp.reduce(evidence, axis=0))
    expected = np.log((weights * np.exp(of_pools)).sum(axis=0))
    assert posterior_logprobs(logprobs, prior, "auto") == pytest.approx(expected, abs=1e-12)
    assert loss(prior, logprobs, "auto") <= min(-of_pools.sum(axis=1)) + math.log(6)


def test_one_token_worked_out_by_hand():
    # evidence 0.9 and 0.1 on equal priors: every pool gives 0.5, so shares stay alike; of share 0 the weights become
    # 0.9 and 0.1, of share 0.3 they return by three tenths: 0.7 · 0.9 + 0.3 · 0.5 = 0.78
    state = learned_share.update(learned_share.start(np.array([0.5, 0.5])), np.log([0.9, 0.1]), np.array([0.5, 0.5]))
    assert state[:, 0] == pytest.approx(np.full(6, 1 / 6))
    assert state[0, 1:] == pytest.approx([0.9, 0.1])
    assert state[-1, 1:] == pytest.approx([0.78, 0.22])
    shares = np.array(learned_share.GRID)
    assert learned_share.member_weights(state)[0] == pytest.approx(np.mean((1 - shares) * 0.9 + shares * 0.5))


def test_a_token_that_all_rule_out_says_nothing():
    prior = np.array([0.5, 0.5])
    state = learned_share.update(learned_share.start(prior), [-1.0, -2.0], prior)
    assert (learned_share.update(state, [-math.inf, -math.inf], prior) == state).all()


def test_tokens_that_no_float_can_tell_apart_leave_weights_that_sum_to_one():
    prior = np.array([0.25, 0.25, 0.5])
    _, state = following.track(
        learned_share.start(prior), np.array([[-1e4] * 60, [-2e4] * 60, [-1.0] * 60]), prior, "auto"
    )
    assert learned_share.member_weights(state).sum() == pytest.approx(1)
    back = following.update(state, [0.0, -1e4, -1e4], prior, "auto")
    assert learned_share.member_weights(back)[0] > 0.9, "a member can come back"


@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0.0, 0.01, "auto"]))
def test_a_text_may_be_followed_in_pieces(seed, num_tokens, share):
    prior, logprobs = text(seed, 3, num_tokens, 1.0)
    whole, end = following.track(following.start(prior, share), logprobs, prior, share)
    border = num_tokens // 2
    head, middle = following.track(following.start(prior, share), logprobs[:, :border], prior, share)
    tail, last = following.track(middle, logprobs[:, border:], prior, share)
    assert np.array_equal(np.concatenate([head, tail[:, 1:]], axis=1), whole)
    assert np.array_equal(last, end)
    assert following.member_weights(end, share) == pytest.approx(whole[:, -1])


def test_a_share_that_is_given_is_the_posterior_pool():
    prior, logprobs = text(1, 4, 30, 1.0)
    path, _ = following.track(following.start(prior, 0.03), logprobs, prior, 0.03)
    assert np.array_equal(path, posterior.track(prior, logprobs, prior, 0.03))
