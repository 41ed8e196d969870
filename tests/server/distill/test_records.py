from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble_server.server.distill.records import (
    FLOOR,
    WINDOWS_PER_SHARD,
    Records,
    condensed,
    joined,
    most_bytes,
    write_shard,
)


def distributions(num_rows: int, num_tokens: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_rows, num_tokens, width, generator=generator)).log_softmax(-1)


def test_the_union_of_the_members_likeliest_tokens_and_the_rest_are_kept() -> None:
    probs = torch.tensor([[[0.5, 0.3, 0.1, 0.06, 0.04]], [[0.1, 0.5, 0.04, 0.06, 0.3]]])  # two members, one position
    record = condensed(probs.log(), torch.tensor([2]), top_k=2)
    assert record.ids.tolist() == [0, 1, 4]  # {0, 1} of the first, {1, 4} of the second
    assert record.counts.tolist() == [3]
    assert np.exp(record.logprobs.astype(float)) == pytest.approx(
        np.array([[0.5, 0.3, 0.04], [0.1, 0.5, 0.3]]), rel=1e-3
    )
    assert np.exp(record.tail.astype(float)) == pytest.approx(np.array([[0.16], [0.10]]), rel=1e-3)
    assert record.of_tokens == pytest.approx(np.log([[0.1], [0.04]]), rel=1e-6)


def test_what_is_kept_of_each_position_sums_to_one_within_float16() -> None:
    record = condensed(distributions(3, 40, 300), torch.arange(40), top_k=16)
    ids, logprobs = record.dense()
    total = np.exp(logprobs).sum(-1) + np.exp(record.tail.astype(float))
    assert total == pytest.approx(np.ones((3, 40)), abs=2e-3)
    assert ids.shape == logprobs.shape[1:] == (40, record.counts.max())
    assert (ids < 300).all()


def test_a_whole_vocabulary_leaves_no_rest() -> None:
    record = condensed(distributions(2, 4, 8), torch.zeros(4, dtype=torch.long), top_k=8)
    assert record.counts.tolist() == [8] * 4
    assert (record.tail == FLOOR).all()


def test_tokens_that_a_member_rules_out_have_probability_zero() -> None:
    logprobs = torch.tensor([[[0.0, -torch.inf]], [[-0.7, -0.7]]])
    record = condensed(logprobs, torch.tensor([0]), top_k=2)
    assert np.exp(record.dense()[1][0, 0]).tolist() == [1.0, 0.0]


def test_windows_come_back_from_their_files_as_they_were(tmp_path: Path) -> None:
    records = [
        condensed(distributions(2, 3 + n % 4, 50, seed=n), torch.arange(3 + n % 4), top_k=5)
        for n in range(WINDOWS_PER_SHARD + 3)
    ]
    write_shard(tmp_path, 0, records[:WINDOWS_PER_SHARD])
    write_shard(tmp_path, 1, records[WINDOWS_PER_SHARD:])
    kept = Records(tmp_path, len(records))
    assert len(kept) == len(records)
    for one, other in zip(records, kept, strict=True):
        for name, array in vars(one).items():
            assert np.array_equal(array, getattr(other, name)), name


def test_the_bound_holds_where_no_two_members_agree(tmp_path: Path) -> None:
    logprobs = torch.stack([torch.roll(distributions(1, 64, 64)[0].sort(-1).values, 20 * k, -1) for k in range(3)])
    record = condensed(logprobs, torch.zeros(64, dtype=torch.long), top_k=10)
    assert record.counts.tolist() == [30] * 64
    write_shard(tmp_path, 0, [record])
    header = 1000
    assert next(tmp_path.iterdir()).stat().st_size <= most_bytes(64, 3, 10) + header


def test_chunks_of_a_window_join_to_what_it_is_in_one_piece() -> None:
    logprobs, targets = distributions(2, 9, 40), torch.arange(9)
    whole = condensed(logprobs, targets, top_k=6)
    parts = joined([condensed(logprobs[:, part], targets[part], top_k=6) for part in (slice(0, 4), slice(4, 9))])
    assert all(np.array_equal(array, getattr(parts, name)) for name, array in vars(whole).items())
