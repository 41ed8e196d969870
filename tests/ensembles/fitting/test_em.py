import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from ensemble_server.ensembles.fitting.em import fit_arithmetic

LOGPROBS = st.tuples(st.integers(1, 4), st.integers(1, 30)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-30, 0))
)


def nats(weights: np.ndarray, logprobs: np.ndarray) -> float:
    return -float(np.log(weights @ np.exp(logprobs)).mean())


@given(LOGPROBS)
def test_no_step_loses_likelihood(logprobs):
    path = np.array(fit_arithmetic(logprobs, max_steps=200).nats_per_token)
    assert (np.diff(path) <= 1e-12 * np.abs(path[:-1]) + 1e-15).all()


@given(LOGPROBS, st.integers(1, 50))
def test_ends_no_worse_than_the_best_single_member_however_few_the_steps(logprobs, max_steps):
    fit = fit_arithmetic(logprobs, max_steps=max_steps)
    best = -logprobs.mean(axis=1).max()
    assert fit.nats_per_token[-1] <= best
    assert nats(fit.weights, logprobs) == pytest.approx(fit.nats_per_token[-1], rel=1e-9, abs=1e-9)


@given(LOGPROBS)
def test_weights_are_probabilities_and_follow_their_members(logprobs):
    fit = fit_arithmetic(logprobs, max_steps=300)
    assert fit.weights.sum() == pytest.approx(1)
    assert (fit.weights >= 0).all()
    turned = fit_arithmetic(logprobs[::-1], max_steps=300)
    assert turned.nats_per_token[-1] == pytest.approx(fit.nats_per_token[-1], abs=1e-6)


@given(LOGPROBS, st.integers(0, 2**31))
def test_the_gap_bounds_what_any_other_weights_gain(logprobs, seed):
    fit = fit_arithmetic(logprobs, max_steps=100)
    others = np.random.default_rng(seed).dirichlet(np.ones(len(logprobs)), size=20)
    best = min(nats(weights, logprobs) for weights in others)
    assert fit.nats_per_token[-1] - best <= fit.gap_nats + 1e-9


def test_finds_the_weights_that_the_tokens_were_drawn_with():
    rng = np.random.default_rng(0)
    members = rng.dirichlet(np.full(30, 0.3), size=3)
    tokens = rng.choice(30, size=50_000, p=np.array([0.6, 0.3, 0.1]) @ members)
    fit = fit_arithmetic(np.log(members[:, tokens]))
    assert fit.weights == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    assert fit.gap_nats <= 1e-6


def test_agrees_with_a_general_optimiser():
    logprobs = np.random.default_rng(1).normal(-3, 2, size=(3, 200))
    start = np.full(3, 1 / 3)
    found = minimize(
        lambda weights: nats(weights, logprobs),
        start,
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    fit = fit_arithmetic(logprobs)
    assert fit.nats_per_token[-1] == pytest.approx(found.fun, abs=1e-6)
    assert fit.weights == pytest.approx(found.x, abs=1e-2)


def test_two_members_that_take_turns_get_equal_weights():
    # By hand: each token has likelihood 1/2 w; log(w/2) + log((1-w)/2) is highest at w = 1/2.
    fit = fit_arithmetic(np.log([[0.5, 1e-300], [1e-300, 0.5]]))
    assert fit.weights == pytest.approx([0.5, 0.5])
    assert fit.nats_per_token[-1] == pytest.approx(np.log(4))


def test_a_member_that_is_always_better_takes_all_the_weight():
    fit = fit_arithmetic(np.log([[0.5, 0.6, 0.7], [0.4, 0.5, 0.6]]))
    assert fit.weights[0] == pytest.approx(1, abs=1e-3)


def test_tokens_that_all_rule_out_are_left_out():
    logprobs = np.log([[0.5, 0.2], [0.2, 0.5]])
    impossible = np.full((2, 1), -np.inf)
    fit = fit_arithmetic(np.hstack([logprobs, impossible]))
    assert fit.num_tokens == 2
    assert fit.nats_per_token == fit_arithmetic(logprobs).nats_per_token


def test_a_token_that_only_one_member_allows_keeps_it_in():
    fit = fit_arithmetic(np.array([[-1.0, -1.0, -np.inf], [-5.0, -5.0, -3.0]]))
    assert fit.weights[1] > 0.3
    assert np.isfinite(fit.nats_per_token[-1])


@pytest.mark.parametrize(
    ("logprobs", "start", "message"),
    [
        (np.empty((0, 5)), None, "members, tokens"),
        (np.empty((2, 0)), None, "no token"),
        (np.full((2, 3), -np.inf), None, "no token"),
        (np.full((2, 3), np.nan), None, "NaN"),
        (np.zeros((2, 3)), [1.0, 0.0], "positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(logprobs, start, message):
    with pytest.raises(ValueError, match=message):
        fit_arithmetic(logprobs, start=start)
