from __future__ import annotations

import numpy as np

from ensemble_server.ensembles.comparison.paired import compare_bits_per_byte
from ensemble_server.server.compare.analysis.null_check import check_of_neighbours, null_check

SIZE = np.full(36, 1000.0)


def test_a_model_whose_figures_move_with_its_windows_fails() -> None:
    rng = np.random.default_rng(0)
    nats = rng.normal(1000, 100, 36)
    noise = rng.normal(0, 1, 36)
    sound = compare_bits_per_byte(nats, SIZE, nats + noise - noise.mean(), SIZE)
    moved = compare_bits_per_byte(nats, SIZE, nats + noise + 3, SIZE)
    assert null_check("text x", "shifted", sound, alpha=0.05).has_passed
    assert not null_check("text x", "shifted", moved, alpha=0.05).has_passed


def test_blocks_of_independent_documents_vary_as_single_ones_do() -> None:
    rng = np.random.default_rng(1)
    check = check_of_neighbours("text x", [rng.normal(size=64) for _ in range(20)], alpha=0.05)
    assert check.has_passed and check.num_trials == 20 and check.num_significant <= 4


def test_dependence_that_reaches_beyond_the_next_document_is_found() -> None:
    """Long waves, and between neighbours noise that hides them from the lag."""
    rng = np.random.default_rng(2)
    waves = np.repeat(rng.normal(size=(20, 8)), 8, axis=1)
    influences = waves * 0.5 + rng.normal(size=(20, 64))
    influences -= influences.mean(axis=1, keepdims=True)
    strong = np.repeat(rng.normal(size=(20, 8)), 8, axis=1) + np.tile([1.5, -1.5], 32)
    strong -= strong.mean(axis=1, keepdims=True)
    assert not check_of_neighbours("text x", list(strong), alpha=0.05).has_passed
    assert check_of_neighbours("text x", list(influences), alpha=0.05).largest_difference > 1


def test_too_few_documents_are_not_checked() -> None:
    assert check_of_neighbours("text x", [np.arange(35.0) - 17], alpha=0.05) is None
    assert check_of_neighbours("text x", [np.zeros(64)], alpha=0.05) is None
