"""The gate's features and weights against a reference that looks at one token after the other, in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Gate
from ensemble_server.ensembles.pooling import following, gated
from tests.gates import a_gate

K, T, V, SHARE = 3, 40, 11, 0.05
NAMED = {"a": 0.5, "b": 0.3, "c": 0.2}
PRIOR = np.array(list(NAMED.values()))


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, np.ndarray]:
    """(K, T, V) log-probabilities, and (T,) what came."""
    generator = torch.Generator().manual_seed(3)
    logprobs = (2 * torch.randn(K, T, V, generator=generator)).log_softmax(-1)
    return logprobs, torch.randint(V, (T,), generator=generator).numpy()


def situation(logprobs: torch.Tensor, targets: np.ndarray, share: following.Share = SHARE) -> gated.Situation:
    nats = logprobs.double().numpy()[:, np.arange(len(targets)), targets]
    posterior, _ = following.track(following.start(PRIOR, share), nats, PRIOR, share)
    recent, places, _ = gated.follow(gated.start(K), nats)
    return gated.Situation(gated.views(logprobs), posterior[:, :-1], recent, places)


def expected_weights(gate: Gate, logprobs: torch.Tensor, targets: np.ndarray) -> list[list[float]]:
    """Per token; written down from the formulas, one number after the other."""
    rows = logprobs.double().tolist()
    state, gains, result = PRIOR.tolist(), [], []
    for t, target in enumerate(targets):
        probs = [[math.exp(x) for x in rows[k][t]] for k in range(K)]
        mean = [sum(p[x] for p in probs) / K for x in range(V)]
        entropy = [-sum(q * math.log(q) for q in p) for p in probs]
        distance = [sum(abs(q - m) for q, m in zip(p, mean, strict=True)) / 2 for p in probs]
        early = 2 ** (-t / 32)
        of = {"entropy": entropy, "distance": distance}
        for h in (4, 16, 64):
            of[f"recent_{h}"] = [sum(2 ** (-(t - s) / h) * gain[k] for s, gain in enumerate(gains)) for k in range(K)]
        of["posterior"] = [math.log(v / max(state)) for v in state]
        of["early_posterior"] = [early * x for x in of["posterior"]]
        seen = {
            "bias": [1.0] * K,
            "spread": [sum(distance) / K] * K,
            "mean_entropy": [sum(entropy) / K] * K,
            "early": [early] * K,
            "entropy": entropy,
        }
        scores = []
        for k, member in enumerate(gate.members.values()):
            score = math.log(state[k])
            for name, term in gate.features.items():
                score += term.weight * (of[name][k] - sum(of[name]) / K) / term.scale
            for name, context in gate.context.items():
                score += member.slopes[name] * (seen[name][k] - context.mean) / context.scale
            scores.append(score)
        total = sum(math.exp(score) for score in scores)
        result.append([math.exp(score) / total for score in scores])
        gave = [rows[k][t][target] for k in range(K)]
        gains.append([x - max(gave) for x in gave])
        moved = [v * math.exp(x) for v, x in zip(state, gave, strict=True)]
        state = [(1 - SHARE) * m / sum(moved) + SHARE * p for m, p in zip(moved, PRIOR, strict=True)]
    return result


def test_weights_are_those_of_a_plain_reference(text):
    found = gated.weights(a_gate(NAMED), situation(*text))
    assert np.abs(found - np.array(expected_weights(a_gate(NAMED), *text)).T).max() < 1e-6


def test_a_gate_that_learnt_nothing_is_the_posterior_pool(text):
    seen = situation(*text)
    assert np.abs(gated.weights(a_gate(NAMED, size=0.0), seen) - seen.posterior).max() < 1e-12


def test_weights_know_nothing_of_what_comes(text):
    logprobs, targets = text
    cut = 17
    other = logprobs.clone()
    other[:, cut + 1 :] = logprobs.flip(-1)[:, cut + 1 :]
    changed = targets.copy()
    changed[cut:] = (changed[cut:] + 1) % V  # the token at `cut` is drawn with the weights there
    before, after = (gated.weights(a_gate(NAMED), situation(*one)) for one in (text, (other, changed)))
    assert (before[:, : cut + 1] == after[:, : cut + 1]).all()
    assert np.abs(before[:, cut + 1 :] - after[:, cut + 1 :]).max() > 1e-3


def test_what_is_kept_goes_on_from_any_token(text):
    nats = text[0].double().numpy()[:, np.arange(T), text[1]]
    whole, places, trail = gated.follow(gated.start(K), nats)
    parts, kept = [], gated.start(K)
    for start, end in ((0, 1), (1, 9), (9, T)):
        recent, numbers, kept = gated.follow(kept, nats[:, start:end])
        assert numbers.tolist() == places[start:end].tolist()
        parts.append(recent)
    assert np.allclose(np.concatenate(parts, axis=2), whole, rtol=0, atol=1e-12)
    assert (kept.num_tokens, kept.sums.tolist()) == (T, trail.sums.tolist())


def test_the_order_of_members_does_not_matter(text):
    logprobs, _ = text
    order = [2, 0, 1]
    gate, seen = a_gate(NAMED), situation(*text)
    names = list(gate.members)
    turned = gate.model_copy(update={"members": {names[k]: gate.members[names[k]] for k in order}})
    moved = gated.Situation(gated.views(logprobs[order]), seen.posterior[order], seen.recent[:, order], seen.places)
    assert np.abs(gated.weights(turned, moved) - gated.weights(gate, seen)[order]).max() < 1e-6


def test_what_members_rule_out_counts_as_much_as_the_floor_and_no_token_is_lost():
    ruled_out = np.array([[-1.0, -math.inf], [-math.inf, -math.inf]])
    recent, _, trail = gated.follow(gated.start(2), ruled_out)
    assert recent[0, :, 1] == pytest.approx([0.0, gated.FLOOR_NATS * 2 ** (-1 / 4)])
    assert trail.num_tokens == 2
    assert np.isfinite(trail.sums).all()


def test_a_gate_with_other_features_is_refused_by_name():
    gate = a_gate(NAMED).model_dump()
    gate["features"]["mood"] = gate["features"].pop("distance")
    with pytest.raises(ValueError, match=r"features must be entropy, distance, .*it has .*mood; train the gate again"):
        Gate.model_validate(gate)
