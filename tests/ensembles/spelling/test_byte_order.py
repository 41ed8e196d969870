"""Ranges of a sorted vocabulary against plain loops over its tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.spelling import byte_order
from ensemble_server.ensembles.spelling.byte_order import ByteOrder, Node


def random_tokens(rng: np.random.Generator, num: int, alphabet: bytes, max_length: int) -> list[bytes]:
    lengths = rng.integers(0, max_length + 1, num)  # tokens without bytes among them
    return [bytes(rng.choice(list(alphabet), size=length).tolist()) for length in lengths]


def prefixes(tokens: list[bytes]) -> set[bytes]:
    return {token[:end] for token in tokens for end in range(len(token) + 1)}


def node_of(order: ByteOrder, prefix: bytes) -> Node:
    node = order.root
    for byte in prefix:
        node = node.child(byte)
        assert node is not None
    return node


@pytest.fixture(params=[600, 30], ids=["large ranges", "small ranges"])
def case(request, monkeypatch) -> tuple[list[bytes], ByteOrder, np.ndarray]:
    monkeypatch.setattr(byte_order, "DIRECT", 20)
    rng = np.random.default_rng(request.param)
    tokens = random_tokens(rng, request.param, b"abcdefg\xc3\xa9", 5)
    return tokens, ByteOrder(tokens, [3, 4]), rng.normal(size=request.param) * 8


def test_a_node_is_the_range_of_tokens_that_begin_alike(case):
    tokens, order, _ = case
    texts = [b"" if i in (3, 4) else token for i, token in enumerate(tokens)]
    for prefix in prefixes([token for token in texts if token]):
        node = node_of(order, prefix)
        expected = {i for i, token in enumerate(texts) if token and token.startswith(prefix)}
        assert set(order.ids[node.lo : node.hi].tolist()) == expected
        assert set(order.ids[node.lo : node.eq].tolist()) == {i for i in expected if texts[i] == prefix}
        assert node.bytes.tolist() == sorted({texts[i][len(prefix)] for i in expected if texts[i] != prefix})
        for byte in range(256):
            assert (node.child(byte) is None) == (byte not in node.bytes)


def test_masses_are_sums_over_tokens_however_small(case):
    tokens, order, logits = case
    logits[::7] -= 60.0
    logits[5] = -math.inf
    distribution = order.distributions(torch.from_numpy(logits)[None])[0]
    is_text = np.array([bool(token) and i not in (3, 4) for i, token in enumerate(tokens)])
    probs = np.exp(logits)
    total = probs[is_text].sum() + probs[[3, 4]].sum()
    assert math.exp(distribution.log_end) == pytest.approx(probs[[3, 4]].sum() / total)
    for prefix in prefixes([token for i, token in enumerate(tokens) if is_text[i]]):
        node = node_of(order, prefix)
        expected = [
            sum(probs[i] for i, token in enumerate(tokens) if is_text[i] and token.startswith(prefix + bytes([byte])))
            / total
            for byte in node.bytes
        ]
        assert distribution.masses(node) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-300)


def test_float32_rows_give_masses_of_single_precision(case):
    _, order, logits = case
    row = torch.from_numpy(logits)[None]
    exact, single = order.distributions(row)[0], order.distributions(row.float())[0]
    assert single.masses(order.root) == pytest.approx(exact.masses(order.root), rel=1e-4)
    assert single.log_end == pytest.approx(exact.log_end, abs=1e-4)


def test_rows_are_normalised_each_by_itself_and_left_alone(case):
    _, order, logits = case
    rows = torch.from_numpy(np.stack([logits, logits[::-1].copy(), logits + 500]))
    before = rows.clone()
    first, _, shifted = order.distributions(rows)
    assert (rows == before).all()
    assert first.masses(order.root).sum() + math.exp(first.log_end) == pytest.approx(1)
    assert shifted.masses(order.root) == pytest.approx(first.masses(order.root))


def test_without_end_of_text_nothing_ends():
    distribution = ByteOrder([b"a", b"b"], []).distributions(torch.zeros(1, 2))[0]
    assert distribution.log_end == -math.inf
    assert distribution.masses(distribution.order.root) == pytest.approx([0.5, 0.5])


def test_a_row_that_gives_no_text_any_probability_has_no_mass():
    order = ByteOrder([b"a", b"b", b""], [])
    distribution = order.distributions(torch.tensor([[-math.inf, -math.inf, 0.0]]))[0]
    assert distribution.masses(order.root).sum() == 0


def test_the_longest_token_that_a_text_begins_with():
    order = ByteOrder([b"t", b"the", b"their", b"q"], [])
    assert order.longest(b"the cat") == 1
    assert order.longest(b"thei") == 1
    assert order.longest(b"theirs") == 2
    assert order.longest(b"cat") is None


def test_a_vocabulary_without_text_is_refused():
    with pytest.raises(ValueError, match="stands for text"):
        ByteOrder([b"", b"</s>"], [1])
