"""Rows in one forward against each row alone, through the same weights in plain transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ensemble_server.server.engines.transformers_engine.attention import Span, partial_attention
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from tests.reference import plain_model

VOCAB = 320
FAMILIES = ["llama", "deep", "qwen", "gpt2", "gemma"]  # gemma: windows of 6 tokens in two of three layers


def texts(seed: int, *lengths: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(VOCAB) for _ in range(length)] for length in lengths]


def plain(folder: Path, text: Sequence[int]) -> torch.Tensor:
    """(T, V) log-probabilities from transformers' own eager attention on this text alone."""
    with torch.no_grad():
        return torch.log_softmax(plain_model(folder)(torch.tensor([text])).logits[0, :, :VOCAB], -1)


def assert_same(logprobs: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_equal_each_row_alone(tiny: dict[str, Path], members: dict[str, Member], family: str) -> None:
    rows = texts(1, 1, 40, 7, 23)
    spans = [Span(RowCache(), row, len(row)) for row in rows]
    for row, logprobs in zip(rows, members[family].backbone.forward(spans), strict=True):
        assert_same(logprobs, plain(tiny[family], row))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_any_size_beside_others_change_nothing(
    tiny: dict[str, Path], members: dict[str, Member], family: str, seed: int
) -> None:
    """Prompt chunks and single tokens of different rows share forwards, past sliding windows and a cache's growth."""
    rows, numbers = texts(seed, 150, 33, 9), random.Random(seed)
    caches, parts = [RowCache() for _ in rows], [[] for _ in rows]
    while open_rows := [i for i, row in enumerate(rows) if caches[i].length < len(row)]:
        spans = []
        for i in open_rows:
            begin = caches[i].length
            chunk = rows[i][begin : begin + numbers.choice([1, 1, 5, 30])]
            spans.append(Span(caches[i], chunk, len(chunk)))
        for i, logprobs in zip(open_rows, members[family].backbone.forward(spans), strict=True):
            parts[i].append(logprobs)
    for row, logprobs in zip(rows, parts, strict=True):
        assert_same(torch.cat(logprobs), plain(tiny[family], row))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_logits_asked_for_are_computed(members: dict[str, Member], family: str) -> None:
    backbone, (one, two, three) = members[family].backbone, texts(2, 9, 5, 6)
    whole = backbone.forward([Span(RowCache(), row, len(row)) for row in (one, two, three)])
    last = backbone.forward([Span(RowCache(), one, 1), Span(RowCache(), two, 0), Span(RowCache(), three, 4)])
    assert [len(logprobs) for logprobs in last] == [1, 0, 4]
    assert_same(last[0], whole[0][-1:])
    assert_same(last[2], whole[2][-4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_may_want_no_logits_at_all(members: dict[str, Member], family: str) -> None:
    """The middle of a long prompt."""
    backbone, (row,) = members[family].backbone, texts(3, 12)
    cache = RowCache()
    (nothing,) = backbone.forward([Span(cache, row[:8], 0)])
    assert nothing.shape == (0, VOCAB) and cache.length == 8
    (rest,) = backbone.forward([Span(cache, row[8:], 1)])
    (whole,) = backbone.forward([Span(RowCache(), row, 1)])
    assert_same(rest, whole)


def test_a_fork_goes_its_own_way(tiny: dict[str, Path], members: dict[str, Member]) -> None:
    backbone, (prompt, one, two) = members["gemma"].backbone, texts(4, 20, 5, 5)
    cache = RowCache()
    backbone.forward([Span(cache, prompt, 0)])
    fork = cache.fork()
    first, second = backbone.forward([Span(cache, one, 5), Span(fork, two, 5)])
    assert_same(first, plain(tiny["gemma"], prompt + one)[-5:])
    assert_same(second, plain(tiny["gemma"], prompt + two)[-5:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_share_their_beginnings_equal_each_row_alone(
    tiny: dict[str, Path], members: dict[str, Member], family: str, seed: int
) -> None:
    """A tree: two rows share one more piece than the third, a fourth shares nothing; chunks and single tokens mixed."""
    backbone, numbers = members[family].backbone, random.Random(seed)
    root, branch, *tails, alone = texts(seed, 40, 9, 6, 7, 5, 12)
    trunk = RowCache()
    backbone.forward([Span(trunk, root, 0)])
    limb = trunk.fork()
    backbone.forward([Span(limb, branch, 0)])
    rows = [root + branch + tails[0], root + branch + tails[1], root + tails[2], alone]
    caches, parts = [limb, limb.fork(), trunk, RowCache()], [[] for _ in rows]
    while open_rows := [i for i, row in enumerate(rows) if caches[i].length < len(row)]:
        spans = []
        for i in open_rows:
            begin = caches[i].length
            chunk = rows[i][begin : begin + numbers.choice([1, 1, 3])]
            spans.append(Span(caches[i], chunk, len(chunk)))
        for i, logprobs in zip(open_rows, backbone.forward(spans), strict=True):
            parts[i].append(logprobs)
    for row, logprobs in zip(rows, parts, strict=True):
        new = torch.cat(logprobs)
        assert_same(new, plain(tiny[family], row)[-len(new) :])


@pytest.mark.parametrize("kernel", ["of the CPU", "of other devices"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_parts_joins_to_attention_of_the_whole(kernel: str, masked: bool) -> None:
    """softmax over two parts, by hand: each part's mean weighted with its sum of exponentials."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 4, 8, generator=generator)
    keys, values = (torch.randn(2, 11, 8, generator=generator) for _ in range(2))
    mask = torch.ones(4, 5, dtype=torch.bool).tril(1) if masked else None
    if kernel != "of the CPU":  # values of another size take the other one
        values = torch.cat([values, values[..., :2]], dim=-1)
    whole_mask = torch.cat([torch.ones(4, 6, dtype=torch.bool), mask], dim=1) if masked else None
    parts = [
        partial_attention(query, keys[:, :6], values[:, :6], None, None),
        partial_attention(query, keys[:, 6:], values[:, 6:], mask, None),
    ]
    weights = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)
    joined = sum(weight[..., None] * output for weight, (output, _) in zip(weights, parts, strict=True))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=whole_mask, enable_gqa=True
    )
    torch.testing.assert_close(joined, expected[0], atol=1e-5, rtol=0)


def test_a_failed_forward_can_be_repeated(
    tiny: dict[str, Path], members: dict[str, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, (row,) = members["llama"].backbone, texts(5, 12)
    cache = RowCache()
    backbone.forward([Span(cache, row[:5], 0)])
    with monkeypatch.context() as patch:
        patch.setattr(backbone.model.lm_head, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backbone.forward([Span(cache, texts(6, 30)[0], 1)])
    assert cache.length == 5
    (logprobs,) = backbone.forward([Span(cache, row[5:], 1)])
    assert_same(logprobs, plain(tiny["llama"], row)[-1:])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_a_token_looks_back_as_far_as_its_window(window: int | None, start: int) -> None:
    cache = RowCache()
    cache.commit(start)
    span = Span(cache, [5] * 4, 1)
    allowed = span.mask(window, torch.device("cpu"))
    expected = [
        [past <= now and (window is None or past > now - window) for past in range(start + 4)]
        for now in range(start, start + 4)
    ]
    assert allowed.tolist() == expected
    assert span.mask(window, torch.device("cpu")) is allowed


def test_rows_do_not_see_each_other(members: dict[str, Member]) -> None:
    """Bit for bit: what stands beside a row does not even change its rounding."""
    backbone, (row, other, third) = members["llama"].backbone, texts(7, 12, 12, 12)
    mixed = [backbone.forward([Span(RowCache(), row, 1), Span(RowCache(), beside, 1)])[0] for beside in (other, third)]
    assert torch.equal(*mixed)
