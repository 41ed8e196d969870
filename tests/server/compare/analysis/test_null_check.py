from __future__ import annotations

import numpy as np

from ensemble_server.server.compare.analysis.null_check import null_check_of_text


def test_a_model_is_not_found_to_differ_from_itself_more_often_than_alpha_allows():
    rng = np.random.default_rng(1)
    bits = rng.lognormal(0, 0.5, 40) * 1000
    check = null_check_of_text("x", bits, np.full(40, 1000.0), seed=0, alpha=0.05)
    assert check.has_passed and check.num_significant <= 0.11 * check.num_trials


def test_too_few_documents_are_not_checked():
    assert null_check_of_text("x", np.ones(11), np.ones(11), seed=0, alpha=0.05) is None


def test_the_same_seed_gives_the_same_check():
    bits = np.random.default_rng(2).normal(5, 1, 24)
    checks = [null_check_of_text("x", bits, np.ones(24), seed=7, alpha=0.05) for _ in range(2)]
    assert checks[0] == checks[1]
