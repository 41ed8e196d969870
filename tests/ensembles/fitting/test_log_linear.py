import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.fitting.log_linear import fit_geometric, nats_and_gradient
from ensemble_server.ensembles.pooling import geometric


def sample(seed: int, *, num_members: int = 3, num_tokens: int = 60, vocab_size: int = 20):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, 2, size=(num_members, num_tokens, vocab_size)), dtype=torch.float32)
    logprobs = torch.log_softmax(logits, -1)
    targets = torch.tensor(rng.integers(vocab_size, size=num_tokens))
    return logprobs, targets


def in_chunks(logprobs, targets, size):
    return lambda: ((logprobs[:, at : at + size], targets[at : at + size]) for at in range(0, len(targets), size))


def pooled_nats(logprobs, targets, weights) -> float:
    """By the pool itself, which takes the weights as it does when it serves."""
    rows = torch.tensor(weights, dtype=torch.float32)[:, None].expand(-1, len(targets))
    return -float(geometric.pool(logprobs, rows).gather(1, targets[:, None]).double().mean())


@given(st.integers(0, 1000), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_gradient_is_that_of_the_loss(seed, weights):
    logprobs, targets = sample(seed)
    logprobs = logprobs.double()
    _, gradient = nats_and_gradient(logprobs, targets, np.array(weights))
    for k in range(3):
        step = np.eye(3)[k] * 1e-4
        high = nats_and_gradient(logprobs, targets, np.array(weights) + step)[0]
        low = nats_and_gradient(logprobs, targets, np.array(weights) - step)[0]
        assert gradient[k] == pytest.approx((high - low) / 2e-4, rel=1e-3, abs=1e-3)


@given(st.integers(0, 1000))
def test_the_loss_is_convex(seed):
    logprobs, targets = sample(seed)
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, 3))
    ends = [nats_and_gradient(logprobs, targets, weights)[0] for weights in (left, right)]
    middle = nats_and_gradient(logprobs, targets, (left + right) / 2)[0]
    assert middle <= sum(ends) / 2 + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_on_the_simplex_is_no_worse_than_members_and_other_weights_by_the_pool_itself(seed):
    logprobs, targets = sample(seed)
    fit = fit_geometric(in_chunks(logprobs, targets, 17))
    assert fit.weights.sum() == pytest.approx(1)
    assert (fit.weights >= 0).all()
    assert fit.nats_per_token == pytest.approx(pooled_nats(logprobs, targets, fit.weights), abs=1e-5)
    assert fit.nats_per_token <= fit.single_nats_per_token.min()
    others = [*np.eye(3), *np.random.default_rng(seed).dirichlet(np.ones(3), size=50)]
    assert fit.nats_per_token <= min(pooled_nats(logprobs, targets, weights) for weights in others) + 1e-5


def test_chunks_do_not_change_the_fit():
    logprobs, targets = sample(7)
    whole, parts = (fit_geometric(in_chunks(logprobs, targets, size)) for size in (60, 7))
    assert parts.weights == pytest.approx(whole.weights, abs=1e-4)
    assert (parts.num_tokens, parts.num_passes) == (60, whole.num_passes)


def test_finds_the_weights_that_the_tokens_were_drawn_with():
    logprobs, _ = sample(3, num_tokens=20_000, vocab_size=8)
    truth = torch.tensor([0.7, 0.3, 0.0])
    pool = geometric.pool(logprobs, truth[:, None].expand(-1, 20_000))
    targets = torch.multinomial(pool.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    fit = fit_geometric(in_chunks(logprobs, targets, 5000))
    assert fit.weights == pytest.approx(truth.numpy(), abs=0.03)


def test_free_weights_find_a_contrast_and_are_no_worse_than_the_simplex():
    logprobs, _ = sample(4, num_tokens=20_000, vocab_size=8)
    truth = torch.tensor([1.2, 0.4, -0.5])
    pool = geometric.pool(logprobs, truth[:, None].expand(-1, 20_000))
    targets = torch.multinomial(pool.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    chunks = in_chunks(logprobs, targets, 5000)
    free = fit_geometric(chunks, constraint="free")
    assert free.weights == pytest.approx(truth.numpy(), abs=0.05)
    assert free.nats_per_token < fit_geometric(chunks).nats_per_token
    assert free.nats_per_token == pytest.approx(pooled_nats(logprobs, targets, free.weights), abs=1e-5)


def test_a_token_that_a_member_rules_out_is_bad_but_not_the_end():
    logprobs, targets = sample(5)
    logprobs[0, 0, targets[0]] = -torch.inf
    fit = fit_geometric(in_chunks(logprobs, targets, 60))
    assert np.isfinite(fit.nats_per_token)
    assert np.isfinite(fit.weights).all()


def test_one_member_needs_no_fit():
    logprobs, targets = sample(6, num_members=1)
    fit = fit_geometric(in_chunks(logprobs, targets, 60))
    assert fit.weights == [1.0]
    assert fit.nats_per_token == fit.single_nats_per_token[0]


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no token"):
        fit_geometric(list)
