"""Tokens of two vocabularies side by side, in cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble_server.server.distill.alignment import TokenMap, warped
from ensemble_server.server.distill.records import recorded


def test_tokens_that_are_equal_stand_together_and_what_is_cut_finer_with_all_of_its_parts() -> None:
    """ "unc" is 2 from "uncut" and 3 from "the", "ut" is 3 from "uncut": 2 + 3 is the least that both can cost."""
    finer, coarser = [b"the", b" unc", b"ut", b" another"], [b"the", b" uncut", b" another"]
    assert warped(finer, coarser) == [[0], [1, 2], [3]]
    assert warped(coarser, finer) == [[0], [1], [1], [2]]


def test_blanks_count_for_nothing_in_a_sequence() -> None:
    assert warped([b" ", b"a", b"b"], [b" a", b"b"]) == [[0, 1], [2]]  # "" costs 1 to "a", as a token more would


def test_of_ways_that_cost_the_same_both_sequences_go_on() -> None:
    """ "un" is 3 from "the" and from "uncut", "cut" is 2 from that: a step of both is taken to get there."""
    assert warped([b"the", b" un", b"cut", b"."], [b"the", b" uncut", b"."]) == [[0, 1], [2], [3]]


IDS = {b"cat": 5, b"cart": 3, b"dog": 7, b" dog": 8}


def test_a_token_stands_for_itself_else_for_the_nearest_or_for_none() -> None:
    near, equal = TokenMap(IDS, is_near=True), TokenMap(IDS, is_near=False)
    assert (near(b"dog"), equal(b"dog")) == (7, 7)
    assert (near(b" dogs"), equal(b" dogs")) == (8, None)  # one letter from " dog", two from "dog"
    assert near(b"cast") == 3  # one letter from "cat" and from "cart": the first, by its id
    assert near(b"cast") == 3


def test_what_stands_for_one_token_is_summed() -> None:
    entries = [(b"cat", 0.5), (b"cats", 0.2), (b"zebra", 0.1), (b"dog", 0.1)]
    ids, probs = TokenMap(IDS, is_near=False).mapped(entries)
    assert dict(zip(ids.tolist(), probs.tolist(), strict=True)) == {5: 0.5, 7: 0.1}
    ids, probs = TokenMap(IDS, is_near=True).mapped(entries[:2])
    assert dict(zip(ids.tolist(), probs.tolist(), strict=True)) == {5: pytest.approx(0.7)}


def test_rows_that_are_known_in_part_become_a_record() -> None:
    """Two members, three tokens of 1, 2 and 1 bytes. Of the first the second member expects nothing."""
    rows = [
        [(np.array([4, 9]), np.array([0.5, 0.25])), (np.array([7]), np.array([1.0])), (np.array([1]), np.array([0.8]))],
        [None, (np.array([2, 7]), np.array([0.6, 0.3])), (np.array([1]), np.array([0.9]))],
    ]
    nats = np.array([[-1.0, -2.0, -3.0, -4.0], [np.nan, -1.0, -1.0, -1.0]])
    record = recorded(rows, nats, np.array([0, 1, 3, 4]), [4, 7, 1], top_k=2)
    ids, logprobs = record.dense()
    assert record.counts.tolist() == [1, 2, 1]
    assert ids[0, 0] == 4 and np.exp(logprobs[:, 0, 0]).tolist() == [1, 1]  # taught as it came
    assert ids[1].tolist() == [2, 7]
    assert np.exp(logprobs[:, 1]) == pytest.approx(np.array([[0, 1], [0.6, 0.3]]), abs=1e-3)
    assert np.exp(record.tail.astype(float)) == pytest.approx(np.array([[0, 0, 0.2], [0, 0.1, 0.1]]), abs=1e-3)
    assert record.of_tokens.tolist() == [[0, -5, -4], [0, -2, -1]]
    assert record.num_bytes.tolist() == [1, 2, 1]
    assert np.isnan(record.of_bytes[:, 0]).all() and record.of_bytes[:, 1:].tolist() == nats[:, 1:].tolist()
