from __future__ import annotations

import pytest
import torch

from ensemble_server.server.engines.transformers_engine.kv_cache import GROWTH, RowCache, held_bytes


def tokens(n: int, *, heads: int = 2, dim: int = 4, start: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.arange(start, start + heads * n * dim).reshape(heads, n, dim)
    return keys, -keys


def test_keys_come_back_in_order_across_growth() -> None:
    cache, written = RowCache(), []
    for n in (3, GROWTH - 3, 1, 2 * GROWTH + 5):
        keys, values = tokens(n, start=100.0 * n)
        written.append(keys)
        all_keys, all_values = cache.extend(0, keys, values)
        cache.commit(n)
        assert torch.equal(all_keys, torch.cat(written, dim=1))
        assert torch.equal(all_values, -torch.cat(written, dim=1))
    assert cache.length == 3 * GROWTH + 6


def test_nothing_counts_before_commit() -> None:
    cache = RowCache()
    cache.extend(0, *tokens(3))
    again, _ = cache.extend(0, *tokens(2, start=50))
    assert torch.equal(again, tokens(2, start=50)[0])
    assert cache.length == 0


def test_layers_may_have_different_shapes() -> None:
    cache = RowCache()
    small, _ = cache.extend(0, *tokens(3))
    large, _ = cache.extend(5, *tokens(3, heads=1, dim=16))
    assert (small.shape, large.shape) == ((2, 3, 4), (1, 3, 16))
    assert cache.num_layers == 2


def test_memory_grows_by_whole_steps() -> None:
    cache = RowCache()
    assert cache.num_bytes == 0
    cache.extend(0, *tokens(1))
    cache.commit(1)
    size = cache.num_bytes
    assert size == 2 * 2 * GROWTH * 4 * 4  # keys and values, heads, tokens, dim, bytes of a float32
    cache.extend(0, *tokens(GROWTH - 1))
    cache.commit(GROWTH - 1)
    assert cache.num_bytes == size
    cache.extend(0, *tokens(1))
    assert cache.num_bytes == 2 * size


def test_what_rows_hold_together_counts_shared_tokens_and_a_row_that_is_named_twice_once() -> None:
    cache = RowCache()
    cache.extend(0, *tokens(3))
    cache.commit(3)
    alone = held_bytes([cache])
    assert alone == cache.num_bytes
    fork = cache.fork()
    shared = 2 * 2 * 3 * 4 * 4  # keys and values, heads, tokens, dim, bytes
    assert held_bytes([cache, fork, fork]) == shared
    fork.extend(0, *tokens(1))
    fork.commit(1)
    assert held_bytes([cache, fork, fork]) == shared + fork.num_bytes > shared
    fork.truncate(2)
    assert fork.num_bytes == 0


def test_a_fork_and_its_origin_share_the_past_and_nothing_else() -> None:
    cache = RowCache()
    cache.extend(0, *tokens(3))
    cache.commit(3)
    fork = cache.fork()
    assert fork.length == cache.length == 3
    assert fork.shared == cache.shared
    assert cache.num_bytes == fork.num_bytes == 0, "what is shared is nobody's own"
    own, _ = cache.extend(0, *tokens(1, start=500))
    forked, values = fork.extend(0, *tokens(1, start=900))
    assert torch.equal(own, tokens(1, start=500)[0]) and torch.equal(forked, tokens(1, start=900)[0])
    whole, _ = fork.with_shared(0, forked, values)
    assert torch.equal(whole, torch.cat([tokens(3)[0], tokens(1, start=900)[0]], dim=1))
    fork.commit(1)
    assert (cache.length, fork.length) == (3, 4)


def test_no_more_of_the_past_is_copied_than_is_asked_for() -> None:
    cache = RowCache()
    for start in (0, 100, 200):
        cache.extend(0, *tokens(3, start=start))
        cache.commit(3)
        cache = cache.fork()
    own = cache.extend(0, *tokens(2, start=300))
    everything = torch.cat([tokens(3, start=start)[0] for start in (0, 100, 200)] + [tokens(2, start=300)[0]], dim=1)
    for num_last in (2, 4, 6, 11):
        keys, values = cache.with_shared(0, *own, num_last)
        assert torch.equal(keys, everything[:, -num_last:]) and torch.equal(values, -keys)
    assert torch.equal(cache.with_shared(0, *own)[0], everything)


def test_copies_reach_into_what_is_shared() -> None:
    cache = RowCache()
    cache.extend(0, *tokens(6))
    cache.commit(6)
    fork = cache.fork()
    fork.extend(0, *tokens(2, start=50))
    fork.commit(2)
    keys, _ = fork.copy_of(4, 7)[0]
    assert torch.equal(keys, torch.cat([tokens(6)[0][:, 4:], tokens(2, start=50)[0][:, :1]], dim=1))
    keys, _ = fork.copy_of(6, 8)[0]
    assert torch.equal(keys, tokens(2, start=50)[0])


def read(cache: RowCache, n: int, start: float = 0.0) -> torch.Tensor:
    """Let `cache` read n tokens. -> their keys"""
    keys, values = tokens(n, start=start)
    cache.extend(0, keys, values)
    cache.commit(n)
    return keys


def known(cache: RowCache) -> torch.Tensor:
    """The keys of all tokens of a row."""
    return cache.copy_of(0, cache.length)[0][0]


@pytest.mark.parametrize("num_kept", [0, 2, 3, 4, 6])
def test_a_row_that_is_rewound_goes_on_as_if_nothing_had_followed(num_kept: int) -> None:
    cache = RowCache()
    first = read(cache, 3)
    twin = cache.fork()  # the first three are shared
    second = read(cache, 3, start=100)
    cache.truncate(num_kept)
    third = read(cache, 2, start=200)
    kept = torch.cat([first, second], dim=1)[:, :num_kept]
    assert torch.equal(known(cache), torch.cat([kept, third], dim=1))
    read(twin, 1, start=300)
    assert torch.equal(known(twin)[:, :3], first)


@pytest.mark.parametrize("num_kept", [1, 3, 4, 6])
def test_a_copy_of_a_rows_beginning_goes_its_own_way(num_kept: int) -> None:
    cache = RowCache()
    first = read(cache, 3)
    cache.fork()
    second = read(cache, 3, start=100)
    whole = torch.cat([first, second], dim=1)
    copy = cache.copy_to(num_kept)
    third = read(copy, 2, start=200)
    assert torch.equal(known(copy), torch.cat([whole[:, :num_kept], third], dim=1))
    assert torch.equal(known(cache), whole)


@pytest.mark.parametrize("num_kept", [1, 4])
def test_a_copy_that_is_planned_has_memory_for_what_it_reads_and_no_more(num_kept: int) -> None:
    cache = RowCache()
    first = read(cache, 3)
    cache.fork()
    second = read(cache, 3, start=100)
    copy = cache.copy_to(num_kept, 2)
    third = read(copy, 2, start=200)
    whole = torch.cat([first, second], dim=1)[:, :num_kept]
    assert torch.equal(known(copy), torch.cat([whole, third], dim=1))
    assert copy.capacity == max(0, num_kept - 3) + 2
    read(copy, 1, start=300)
    assert copy.capacity == GROWTH
