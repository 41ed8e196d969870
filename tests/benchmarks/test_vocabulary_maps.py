"""The approximations that averages over bytes are compared with, by hand on vocabularies of a few tokens."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import vocabulary_maps
from benchmarks.vocabulary_maps import MinED, Strings, gac, unite

PIVOT = Strings([b"", b"the", b"re", b"cat"], lambda text: [1] if text.startswith("the") else [3])
OTHER = Strings([b"there", b"the", b"cats", b"the"], lambda text: [0] if text == "re" else [2])
OF_PIVOT = torch.tensor([0.1, 0.5, 0.1, 0.3])
OF_OTHER = torch.tensor([0.4, 0.1, 0.3, 0.2])


def test_the_union_of_strings_sums_equal_ones_and_gives_what_a_member_lacks_zero() -> None:
    assert gac(PIVOT, OTHER, OF_PIVOT, OF_OTHER, b"the") == pytest.approx(math.log((0.5 + 0.1 + 0.2) / 2))
    assert gac(PIVOT, OTHER, OF_PIVOT, OF_OTHER, b"re") == pytest.approx(math.log(0.1 / 2))


def test_the_union_of_the_likeliest_rules_out_all_other_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_maps, "TOP", 2)
    # The likeliest are the, cat; there, cats. The pivot lacks the last two and takes the first token of each.
    ours = {"the": 0.5, "cat": 0.3, "there": 0.5, "cats": 0.3}
    theirs = {"the": 0.3, "cat": 0.3, "there": 0.4, "cats": 0.3}
    expected = (ours["cat"] / sum(ours.values()) + theirs["cat"] / sum(theirs.values())) / 2
    assert unite(PIVOT, OTHER, OF_PIVOT, OF_OTHER, b"cat") == pytest.approx(math.log(expected))
    assert unite(PIVOT, OTHER, OF_PIVOT, OF_OTHER, b"re") == -math.inf


def test_tokens_go_to_the_nearest_of_the_pivot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_maps, "MAPPED", 4)
    mapped = MinED(PIVOT, OTHER)
    assert mapped(OF_PIVOT, OF_OTHER, b"cat") == pytest.approx(math.log((0.3 + 0.3) / 2))  # cats -> cat
    assert mapped(OF_PIVOT, OF_OTHER, b"the") == pytest.approx(math.log((0.5 + 0.7) / 2))  # there -> the
