from __future__ import annotations

import pytest

from ensemble_server.server.proposal.memory import MAX_BATCH, Load, fit, num_bytes
from ensemble_server.server.weights.footprint import Shape, Weights

# 1 G parameters in 16 bits: 2 GB, in float32 4 GB. A token's cache: 2 x 10 layers x 4 heads x 64 x 2 bytes = 10,240.
LOAD = Load(Weights(10**9, 2 * 10**9), Shape(10, 4, 64, 8192), num_members=1)


def test_bytes_are_weights_once_and_a_cache_per_member_and_sequence() -> None:
    assert num_bytes([LOAD], "auto", 1, 1000) == 2 * 10**9 + 10_240_000
    assert num_bytes([LOAD], "float32", 2, 1000) == 4 * 10**9 + 2 * 20_480_000
    twice = Load(LOAD.weights, LOAD.shape, num_members=2)
    assert num_bytes([twice], "auto", 3, 1000) == 2 * 10**9 + 3 * 2 * 10_240_000


def test_with_room_nothing_is_given_up() -> None:
    fitted = fit([LOAD], 100 * 10**9, prefers_float32=True)
    assert (fitted.dtype, fitted.max_batch, fitted.max_context, fitted.is_full) == ("float32", MAX_BATCH, 4096, True)
    assert fit([LOAD], 100 * 10**9, prefers_float32=False).dtype == "auto"


@pytest.mark.parametrize("free_gb", [2.5, 3, 4, 5, 6, 8])
def test_what_is_proposed_fits_with_some_to_spare(free_gb: float) -> None:
    fitted = fit([LOAD], int(free_gb * 1e9), prefers_float32=True)
    assert fitted.dtype is not None and fitted.num_bytes <= 0.85 * free_gb * 1e9
    assert fitted.num_bytes == num_bytes([LOAD], fitted.dtype, fitted.max_batch, fitted.max_context)


def test_sequences_go_before_context_and_both_before_the_dtype() -> None:
    small = fit([LOAD], 6 * 10**9, prefers_float32=True)
    assert small.dtype == "float32" and small.max_batch < MAX_BATCH and small.max_context == 4096
    assert fit([LOAD], 3 * 10**9, prefers_float32=True).dtype == "auto"


def test_what_cannot_fit_is_said() -> None:
    fitted = fit([LOAD], 10**9, prefers_float32=True)
    assert fitted.dtype is None and fitted.num_bytes > 10**9


def test_a_short_model_is_not_given_a_long_context() -> None:
    short = Load(LOAD.weights, Shape(10, 4, 64, 1024), num_members=1)
    assert fit([short], 100 * 10**9, prefers_float32=False).max_context == 1024
