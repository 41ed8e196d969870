"""The loss against NumPy over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_server.server.distill.loss import Batch, loss_of, token_losses


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, 6))


def batch(ids: list, probs: list, tail: list) -> Batch:
    inputs = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0]])
    is_scored = torch.tensor([[True, True, True], [True, False, False]])
    return Batch(inputs, inputs[:, 1:], is_scored, torch.tensor(ids), torch.tensor(probs), torch.tensor(tail))


def example() -> Batch:
    ids = [[[1, 2]] * 3, [[5, 0], [0, 0], [0, 0]]]
    probs = [[[0.5, 0.3], [0.6, 0.4], [0.2, 0.2]], [[0.7, 0.1], [0.0, 0.0], [0.0, 0.0]]]
    tail = [[0.2, 0.0, 0.6], [0.2, 0.0, 0.0]]
    return batch(ids, probs, tail)


def test_both_losses_are_those_of_numpy_on_what_is_scored(logits: np.ndarray) -> None:
    clm, kl = token_losses(torch.from_numpy(logits), example())
    logprobs = log_softmax(logits)
    scored = [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert clm.numpy() == pytest.approx([-logprobs[at][token] for at, token in zip(scored, [1, 2, 3, 5], strict=True)])
    expected = []
    for (row, place), ids, probs, tail in zip(
        scored,
        [[1, 2], [1, 2], [1, 2], [5, 0]],
        [[0.5, 0.3], [0.6, 0.4], [0.2, 0.2], [0.7, 0.1]],
        [0.2, 0, 0.6, 0.2],
        strict=True,
    ):
        q = np.exp(logprobs[row, place])
        rest = 1 - q[ids].sum()
        pairs = [*zip(probs, q[ids], strict=True), *([(tail, rest)] if tail else [])]
        expected.append(sum(p * np.log(p / of_q) for p, of_q in pairs))
    assert kl is not None
    assert kl.numpy() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_that_of_the_cross_entropy_with_the_bucket(logits: np.ndarray) -> None:
    leaf = torch.from_numpy(logits).float().requires_grad_()
    _, kl = token_losses(leaf, example())
    assert kl is not None
    kl[0].backward()
    assert leaf.grad is not None
    q = np.exp(log_softmax(logits[0, 0]))
    # d CE / d logit = q - target, the bucket's part of the target spread as the student has it
    rest = np.ones(6, dtype=bool)
    rest[[1, 2]] = False
    target = np.where(rest, 0.2 * q / q[rest].sum(), [0, 0.5, 0.3, 0, 0, 0])
    assert leaf.grad[0, 0].numpy() == pytest.approx(q - target, abs=1e-6)


def test_a_student_that_is_the_teacher_pays_nothing_beyond_the_text(logits: np.ndarray) -> None:
    q = np.exp(log_softmax(logits))
    ids = np.broadcast_to([3, 1], (2, 3, 2)).tolist()
    kept = np.take_along_axis(q, np.array(ids), axis=-1)
    _, kl = token_losses(torch.from_numpy(logits), batch(ids, kept.tolist(), (1 - kept.sum(-1)).tolist()))
    assert kl is not None
    assert kl.numpy() == pytest.approx(np.zeros(4), abs=1e-6)


def test_places_that_are_filled_up_count_once(logits: np.ndarray) -> None:
    """A position with fewer tokens repeats one of them with probability 0."""
    ids = [[[1, 2, 1]] * 3, [[5, 0, 5], [0, 0, 0], [0, 0, 0]]]
    plain = example()
    assert plain.probs is not None and plain.tail is not None
    probs = torch.nn.functional.pad(plain.probs, (0, 1))
    _, padded = token_losses(torch.from_numpy(logits), batch(ids, probs.tolist(), plain.tail.tolist()))
    _, bare = token_losses(torch.from_numpy(logits), plain)
    assert padded is not None and bare is not None
    assert torch.equal(padded, bare)


def test_without_a_target_there_is_the_text_alone(logits: np.ndarray) -> None:
    plain = example()
    clm, kl = token_losses(torch.from_numpy(logits), Batch(plain.inputs, plain.tokens, plain.is_scored))
    assert kl is None
    assert loss_of(clm, kl, 0.5) == clm.mean()


def test_the_loss_is_a_weighted_sum() -> None:
    clm, kl = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.1])
    assert float(loss_of(clm, kl, 0.75)) == pytest.approx(0.75 * 2 + 0.25 * 0.3)
    assert float(loss_of(clm, kl, 1.0)) == 2
