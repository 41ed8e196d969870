from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.pooling import pool


@st.composite
def opinions(
    draw: st.DrawFn, *, max_members: int = 4, lowest: float = 0.0, impossible: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs (K, B, V), some of them -inf, and weights (K, B) from `lowest` to 4, positive for the first member."""
    members, rows, vocab = draw(st.integers(1, max_members)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(scale=draw(st.sampled_from([0.1, 3, 10])), size=(members, rows, vocab))
    logits[random.random(logits.shape) < impossible] = -np.inf
    logits[..., 0] = np.maximum(logits[..., 0], -20)  # each member finds something possible
    weights = random.uniform(lowest, 4, (members, rows))
    weights[0] = np.abs(weights[0]) + 0.5
    logprobs = torch.log_softmax(torch.tensor(logits, dtype=torch.float32), -1)
    return logprobs, torch.tensor(weights, dtype=torch.float32)


def geometric(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    before = logprobs.clone(), weights.clone()
    pooled = pool("geometric", logprobs, weights)
    assert torch.equal(logprobs, before[0]) and torch.equal(weights, before[1]), "inputs must not change"
    assert pooled.dtype == torch.float32
    return pooled


def reference(logprobs: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """The formula in float64, row by row."""
    result = np.empty(logprobs.shape[1:])
    for row in range(result.shape[0]):
        w, logp = weights[:, row].numpy().astype(float), logprobs[:, row].numpy().astype(float)
        if (w >= 0).all():
            w = w / w.sum()
        pooled = sum(w_k * row_k for w_k, row_k in zip(w, logp, strict=True) if w_k != 0)
        result[row] = pooled - np.logaddexp.reduce(pooled)
    return result


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_case_worked_out_by_hand() -> None:
    # equal weights: sqrt(0.8 · 0.2) = 0.4 and sqrt(0.2 · 0.8) = 0.4, rescaled to 1/2 and 1/2
    # weights 3 and 1: 0.8^¾ 0.2^¼ : 0.2^¾ 0.8^¼ = (0.8/0.2)^½ : 1 = 2 : 1
    logprobs = torch.tensor([[[0.8, 0.2], [0.8, 0.2]], [[0.2, 0.8], [0.2, 0.8]]]).log()
    pooled = geometric(logprobs, torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
    assert close(pooled.exp(), torch.tensor([[1 / 2, 1 / 2], [2 / 3, 1 / 3]]))


def test_proxy_tuning_worked_out_by_hand() -> None:
    # large · expert / base = (0.5 · 0.6 / 0.3, 0.5 · 0.4 / 0.7) = (1, 2/7), rescaled to (7/9, 2/9)
    logprobs = torch.tensor([[[0.5, 0.5]], [[0.6, 0.4]], [[0.3, 0.7]]]).log()
    assert close(geometric(logprobs, torch.tensor([[1.0], [1.0], [-1.0]])).exp(), torch.tensor([[7 / 9, 2 / 9]]))


@given(opinions())
def test_positive_weights_follow_the_formula(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    np.testing.assert_allclose(geometric(*given_), reference(*given_), rtol=1e-4, atol=1e-4)


@given(opinions(lowest=-4))
def test_negative_weights_follow_the_formula_as_written(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    np.testing.assert_allclose(geometric(*given_), reference(*given_), rtol=1e-4, atol=1e-3)


@given(opinions(max_members=1), opinions(max_members=1), st.floats(0.125, 4))
def test_with_and_without_is_classifier_free_guidance(
    with_: tuple[torch.Tensor, torch.Tensor], without_: tuple[torch.Tensor, torch.Tensor], strength: float
) -> None:
    vocab = min(with_[0].shape[-1], without_[0].shape[-1])
    conditional, unconditional = (torch.log_softmax(logprobs[0, :1, :vocab], -1) for logprobs, _ in (with_, without_))
    guided = torch.log_softmax(unconditional + (1 + strength) * (conditional - unconditional), -1)
    pooled = geometric(torch.stack([conditional, unconditional]), torch.tensor([[1 + strength], [-strength]]))
    assert close(pooled, guided)


@given(opinions(lowest=-4, impossible=0.3))
def test_it_sums_to_one_and_is_never_nan(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    pooled = geometric(*given_)
    assert not pooled.isnan().any()
    total = pooled.exp().sum(-1)
    assert close(total, torch.ones_like(total))


@given(opinions(lowest=-4, impossible=0.3), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(given_: tuple[torch.Tensor, torch.Tensor], random: object) -> None:
    logprobs, weights = given_
    order = list(range(len(logprobs)))
    random.shuffle(order)
    assert torch.allclose(
        geometric(logprobs, weights), geometric(logprobs[order], weights[order]), rtol=1e-3, atol=1e-3
    )


@given(opinions(lowest=-4, impossible=0.3))
def test_weight_zero_is_absence(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    logprobs, weights = given_
    stranger = torch.full_like(logprobs[:1], -torch.inf)
    stranger[..., -1] = 0.0
    with_stranger = geometric(torch.cat([logprobs, stranger]), torch.cat([weights, torch.zeros_like(weights[:1])]))
    assert close(with_stranger, geometric(logprobs, weights))


@given(opinions(impossible=0.3))
def test_copies_of_one_member_with_positive_weights_give_that_member(
    given_: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logprobs, weights = given_
    assert close(geometric(logprobs[:1].repeat(len(weights), 1, 1), weights), logprobs[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5), (2.0, -1.0)])
def test_a_member_of_positive_weight_rules_a_token_out(weights: tuple[float, float]) -> None:
    impossible = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    other = torch.tensor([[[0.1, 0.1, 0.8]]]).log()
    pooled = geometric(torch.cat([impossible, other]), torch.tensor(weights)[:, None])
    assert pooled[0, 2] == -torch.inf
    assert close(pooled[0, :2].exp(), torch.tensor([0.5, 0.5]))


def test_what_both_sides_of_a_contrast_rule_out_stays_ruled_out() -> None:
    logprobs = torch.tensor([[[0.5, 0.5, 0.0]], [[0.9, 0.1, 0.0]]]).log()
    pooled = geometric(logprobs, torch.tensor([[1.0], [-1.0]]))
    # 0.5/0.9 : 0.5/0.1 = 1 : 9
    assert close(pooled.exp(), torch.tensor([[0.1, 0.9, 0.0]]))


def test_what_the_negative_member_rules_out_is_no_certainty() -> None:
    """The formula divides by zero there; a token that the positive member finds impossible must not win by that."""
    positive = torch.tensor([[[-0.7, -0.7, -150.0]]])
    negative = torch.tensor([[[-0.7, -0.7, -torch.inf]]])
    pooled = geometric(torch.cat([positive, negative]), torch.tensor([[1.0], [-1.0]]))
    assert pooled[0, 2] < -40
    assert pooled.isfinite().all()


def test_members_that_rule_out_all_of_each_others_tokens_still_give_a_distribution() -> None:
    logprobs = torch.tensor([[[0.75, 0.25, 0.0]], [[0.0, 0.0, 1.0]]]).log()
    pooled = geometric(logprobs, torch.ones(2, 1))
    assert not pooled.isnan().any()
    assert close(pooled.exp().sum(), torch.tensor(1.0))


# --- tokens that some members lack ---


def test_who_lacks_a_token_has_no_opinion_of_it_worked_out_by_hand() -> None:
    # Weights 1 and 3, scaled to 1/4 and 3/4. The last token is the second member's alone; its own opinion counts whole.
    # scores: 0.8^1/4 0.1^3/4 = 0.1682,  0.2^1/4 0.4^3/4 = 0.3364,  0.5;  their sum is 1.0045
    logprobs = torch.tensor([[[0.8, 0.2, 0.0]], [[0.1, 0.4, 0.5]]]).log()
    known = torch.tensor([[[True, True, False]], [[True, True, True]]])
    pooled = pool("geometric", logprobs, torch.tensor([[1.0], [3.0]]), known).exp()
    assert close(pooled, torch.tensor([[0.1674, 0.3349, 0.4977]]))


def test_with_a_negative_weight_a_token_that_some_member_lacks_is_out() -> None:
    logprobs = torch.tensor([[[0.8, 0.2, 0.0]], [[0.1, 0.4, 0.5]]]).log()
    known = torch.tensor([[[True, True, False]], [[True, True, True]]])
    for weights in ([[1.5], [-0.5]], [[-0.5], [1.5]]):
        pooled = pool("geometric", logprobs, torch.tensor(weights), known)
        assert pooled[0, 2] == -torch.inf
        assert close(pooled.exp().sum(-1), torch.ones(1))


def test_a_member_of_weight_zero_does_not_make_a_token_rare() -> None:
    logprobs = torch.tensor([[[0.8, 0.2, 0.0]], [[0.1, 0.4, 0.5]]]).log()
    known = torch.tensor([[[True, True, False]], [[True, True, True]]])
    pooled = pool("geometric", logprobs, torch.tensor([[0.0], [1.0]]), known)
    assert close(pooled.exp(), torch.tensor([[0.1, 0.4, 0.5]]))


@given(opinions())
def test_where_all_have_all_nothing_changes(members: tuple[torch.Tensor, torch.Tensor]) -> None:
    logprobs, weights = members
    known = torch.ones(logprobs.shape, dtype=torch.bool)
    assert torch.equal(pool("geometric", logprobs, weights, known), pool("geometric", logprobs, weights))
