from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ensemble_server.ensembles.gating import gate_vector, mixture_weights, softmax

numbers = st.floats(-1, 1, width=32)
vectors = st.lists(st.lists(numbers, min_size=3, max_size=3).map(np.array), min_size=1, max_size=4)
scores = st.lists(numbers, min_size=1, max_size=6)
temperatures = st.floats(0.01, 10)


def test_a_gate_points_from_the_negative_to_the_positive_prompts() -> None:
    positive = [np.array([1.0, 0.0]), np.array([0.6, 0.8])]  # mean (.8, .4)
    negative = [np.array([0.0, 0.4])]  # less (0, .4): (.8, 0), and of length one (1, 0)
    assert gate_vector(positive, negative) == pytest.approx([1, 0])


def test_a_gate_whose_prompts_cancel_has_no_direction() -> None:
    assert gate_vector([np.array([1.0, 0.0])], [np.array([1.0, 0.0])]) == pytest.approx([0, 0])


@given(vectors, vectors)
def test_the_order_of_prompts_does_not_change_a_gate(positive: list[np.ndarray], negative: list[np.ndarray]) -> None:
    gate = gate_vector(positive, negative)
    assume(float(np.linalg.norm(np.mean(positive, axis=0) - np.mean(negative, axis=0))) > 1e-3)
    assert np.linalg.norm(gate) == pytest.approx(1)
    assert gate_vector(positive[::-1], negative[::-1]) == pytest.approx(gate)


@given(scores, temperatures)
def test_gates_sum_to_one_and_keep_the_order_of_scores(scores: list[float], temperature: float) -> None:
    gates = softmax(scores, temperature)
    assert sum(gates) == pytest.approx(1)
    assert all(gates[i] >= gates[j] for i in range(len(gates)) for j in range(len(gates)) if scores[i] >= scores[j])


def test_the_temperature_says_how_sharp_gates_are() -> None:
    assert softmax([0.5, 0.4], 0.1) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert softmax([0.5, 0.4], 1e-3)[0] == pytest.approx(1)
    assert softmax([0.5, 0.4], 1e3) == pytest.approx([0.5, 0.5], abs=1e-3)


def test_chosen_gates_are_renormalised_beside_the_always_on_members() -> None:
    gates = {"a": 0.3, "b": 0.6, "c": 0.1}
    assert mixture_weights(gates, 1, {}) == {"b": 1}
    assert mixture_weights(gates, 2, {}) == pytest.approx({"b": 2 / 3, "a": 1 / 3})
    assert list(mixture_weights(gates, 2, {"s": 1.0})) == ["b", "a", "s"]
    assert mixture_weights(gates, 2, {"s": 1.0}) == pytest.approx({"b": 1 / 3, "a": 1 / 6, "s": 1 / 2})


def test_of_equal_gates_the_first_is_chosen() -> None:
    assert mixture_weights({"a": 0.5, "b": 0.5}, 1, {}) == {"a": 1}


@given(scores, temperatures, st.integers(1, 6), st.floats(0.1, 5))
def test_weights_sum_to_one(scores: list[float], temperature: float, top_k: int, scale: float) -> None:
    gates = dict(enumerate(softmax(scores, temperature)))
    weights = mixture_weights(gates, top_k, {"s": scale})
    assert sum(weights.values()) == pytest.approx(1)
    assert len(weights) == min(top_k, len(gates)) + 1
