from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.label_probabilities import (
    as_ranks,
    averaged,
    common_prefix_length,
    geometric,
    label_probabilities,
    likeliest,
)

LOGPROBS = st.lists(st.floats(-60, 0), min_size=2, max_size=6).map(
    lambda values: {f"label {place}": value for place, value in enumerate(values)}
)


@given(LOGPROBS)
def test_probabilities_sum_to_one_and_keep_the_order(logprobs: dict[str, float]) -> None:
    probabilities = label_probabilities(logprobs)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert logprobs[likeliest(probabilities)] == pytest.approx(max(logprobs.values()))


@given(LOGPROBS, st.floats(-20, 20))
def test_what_all_labels_have_in_common_does_not_matter(logprobs: dict[str, float], shift: float) -> None:
    shifted = {label: value + shift for label, value in logprobs.items()}
    assert label_probabilities(shifted) == pytest.approx(label_probabilities(logprobs), abs=1e-9)


def test_two_labels_by_hand() -> None:
    # e^-1 / (e^-1 + e^-2) = 1 / (1 + e^-1)
    found = label_probabilities({"yes": -1.0, "no": -2.0})
    assert found["yes"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_lengths_divide_the_sums() -> None:
    found = label_probabilities({"short": -2.0, "long": -6.0}, lengths={"short": 1, "long": 3})
    assert found == pytest.approx({"short": 0.5, "long": 0.5})


def test_a_prior_is_divided_out() -> None:
    # 0.8 / 0.9 : 0.2 / 0.1 = 0.889 : 2
    logprobs = {"a": math.log(0.8), "b": math.log(0.2)}
    found = label_probabilities(logprobs, prior={"a": 0.9, "b": 0.1})
    assert found["a"] == pytest.approx((0.8 / 0.9) / (0.8 / 0.9 + 2))


@given(LOGPROBS)
def test_what_equals_its_own_prior_is_undecided(logprobs: dict[str, float]) -> None:
    logprobs = {label: max(value, -20) for label, value in logprobs.items()}
    found = label_probabilities(logprobs, prior=label_probabilities(logprobs))
    assert found == pytest.approx(dict.fromkeys(logprobs, 1 / len(logprobs)))


def test_labels_that_cannot_be_are_all_alike_and_one_that_cannot_is_zero() -> None:
    assert label_probabilities({"a": -math.inf, "b": -math.inf}) == {"a": 0.5, "b": 0.5}
    assert label_probabilities({"a": -math.inf, "b": -3.0}) == {"a": 0.0, "b": 1.0}


def test_a_label_that_the_prior_excludes_does_not_win_by_dividing_by_nothing() -> None:
    found = label_probabilities({"a": -1.0, "b": -200.0}, prior={"a": 1.0, "b": 0.0})
    assert likeliest(found) == "a"


def test_members_are_averaged_by_weight() -> None:
    found = averaged({"x": {"a": 1.0, "b": 0.0}, "y": {"a": 0.2, "b": 0.8}}, {"x": 1, "y": 3})
    assert found == pytest.approx({"a": 0.4, "b": 0.6})  # (1 + 0.6) / 4


def test_of_equal_labels_the_first_is_taken() -> None:
    assert likeliest({"b": 0.4, "a": 0.4, "c": 0.2}) == "b"


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1))
def test_the_common_prefix_is_common_and_no_longer(front: list[int], tails: list[list[int]]) -> None:
    sequences = [front + tail for tail in tails]
    length = common_prefix_length(sequences)
    assert length >= len(front)
    assert len({tuple(ids[:length]) for ids in sequences}) == 1
    assert any(len(ids) == length for ids in sequences) or len({ids[length] for ids in sequences}) > 1


def test_the_geometric_pool_is_the_normalised_weighted_geometric_mean() -> None:
    members = {"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.5, "y": 0.5}}
    x, y = 0.9 ** (3 / 4) * 0.5 ** (1 / 4), 0.1 ** (3 / 4) * 0.5 ** (1 / 4)
    pooled = geometric(members, {"a": 3, "b": 1})
    assert pooled == pytest.approx({"x": x / (x + y), "y": y / (x + y)})
    assert geometric(members, {"a": 0, "b": 1}) == pytest.approx({"x": 0.5, "y": 0.5})


def test_what_one_member_rules_out_is_out_of_a_geometric_pool() -> None:
    assert geometric({"a": {"x": 0.0, "y": 1.0}, "b": {"x": 0.9, "y": 0.1}}, {"a": 1, "b": 1}) == {"x": 0.0, "y": 1.0}
    assert geometric({"a": {"x": 0.0, "y": 1.0}, "b": {"x": 1.0, "y": 0.0}}, {"a": 1, "b": 1}) == {"x": 0.5, "y": 0.5}


def test_ranks_are_among_rows_and_equal_ones_share_theirs() -> None:
    rows = [{"x": 0.2, "y": 0.8}, {"x": 0.9, "y": 0.1}, {"x": 0.2, "y": 0.8}]
    assert as_ranks(rows) == [{"x": 1.5 / 4, "y": 2.5 / 4}, {"x": 3 / 4, "y": 1 / 4}, {"x": 1.5 / 4, "y": 2.5 / 4}]
