from __future__ import annotations

import numpy as np
import pytest

from ensemble_server.ensembles.fitting.gate import NOT_TRAINED, Design, GateText, fit_gate, gated_logprobs
from ensemble_server.ensembles.fitting.share import posterior_logprobs

PRIOR = np.full(2, 0.5)
NAMES = [("a", "1"), ("b", "2")]


def window(seed: int, *, is_telling: bool, num_tokens: int = 240) -> GateText:
    """Two members that are right by turns, at random. If `is_telling`, whoever is right at a token is sure there."""
    rng = np.random.default_rng(seed)
    right = rng.integers(2, size=num_tokens)
    is_right = np.arange(2)[:, None] == right
    logprobs = np.where(is_right, np.log(0.6), np.log(0.02))
    entropy = rng.uniform(1, 3, size=(2, num_tokens)) - (1.5 * is_right if is_telling else 0)
    distance = rng.uniform(0, 1, size=(2, num_tokens))
    return GateText(logprobs, np.stack([entropy, distance]), np.arange(num_tokens) * 4 // num_tokens)


def nats(fit, text: GateText) -> float:
    return -gated_logprobs(fit.gate, text.logprobs, text.views, PRIOR, 0.01).mean()


def test_the_gradient_is_that_of_the_likelihood():
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(3, 2, 30)), rng.normal(size=(4, 2, 30))
    design = Design(x, z, np.log(rng.dirichlet((1, 1), size=30).T), -rng.exponential(size=(2, 30)))
    point, step = rng.normal(size=3 + 4 * 2), 1e-5
    _, gradient = design.loss(point, 0.1)
    for place in range(len(point)):
        away = step * np.eye(len(point))[place]
        numeric = (design.loss(point + away, 0.1)[0] - design.loss(point - away, 0.1)[0]) / (2 * step)
        assert gradient[place] == pytest.approx(numeric, abs=1e-8)


def test_the_loss_is_that_of_the_pool():
    text = window(0, is_telling=True)
    fit = fit_gate([text], PRIOR, 0.01, NAMES)
    assert fit.posterior_nats == pytest.approx(-posterior_logprobs(text.logprobs, PRIOR, 0.01).mean(), abs=1e-9)


def test_of_each_fold_the_gate_is_judged_that_has_not_seen_it():
    text = window(0, is_telling=True)
    fit = fit_gate([text], PRIOR, 0.01, NAMES, penalties=(0.01,))
    parts = []
    for fold in range(4):
        # What is not trained on is scaled by what is in either case, so only scales differ: hence the tolerance.
        rest = GateText(text.logprobs, text.views, np.where(text.folds == fold, NOT_TRAINED, text.folds))
        gate = fit_gate([rest], PRIOR, 0.01, NAMES, penalties=(0.01,)).gate
        parts.append(gated_logprobs(gate, text.logprobs, text.views, PRIOR, 0.01)[text.folds == fold])
    assert fit.nats == pytest.approx(-np.concatenate(parts).mean(), abs=0.01)


def test_a_gate_learns_to_trust_who_is_sure_where_that_tells():
    fit = fit_gate([window(seed, is_telling=True) for seed in range(3)], PRIOR, 0.01, NAMES)
    assert fit.penalty is not None
    text = window(9, is_telling=True)
    assert nats(fit, text) < -posterior_logprobs(text.logprobs, PRIOR, 0.01).mean() - 0.2


def test_a_gate_that_learns_nothing_worth_knowing_stays_near_the_posterior_pool():
    fit = fit_gate([window(seed, is_telling=False) for seed in range(3)], PRIOR, 0.01, NAMES)
    assert fit.nats <= fit.posterior_nats
    text = window(9, is_telling=False)
    assert nats(fit, text) < -posterior_logprobs(text.logprobs, PRIOR, 0.01).mean() + 0.05


def test_the_same_texts_give_the_same_gate_and_a_written_one_says_the_same():
    texts = [window(seed, is_telling=True) for seed in range(2)]
    one, other = (fit_gate(texts, PRIOR, 0.01, NAMES).gate for _ in range(2))
    assert one == other
    assert type(one).model_validate_json(one.model_dump_json()) == one


def test_tokens_that_no_member_has_are_not_trained_on():
    text = window(0, is_telling=True)
    gone = text.logprobs.copy()
    gone[:, 5] = -np.inf
    fit = fit_gate([GateText(gone, text.views, text.folds)], PRIOR, 0.01, NAMES)
    assert fit.num_tokens == 239


def test_one_fold_is_refused():
    text = window(0, is_telling=True)
    with pytest.raises(ValueError, match="two folds"):
        fit_gate([GateText(text.logprobs, text.views, np.zeros(240, dtype=int))], PRIOR, 0.01, NAMES)
