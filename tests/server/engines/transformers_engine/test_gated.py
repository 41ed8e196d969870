"""A learned gate in the engine: the weights it draws with are those with which a text is scored."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest

from ensemble_server.ensembles.base import Answer, GenerationRequest, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.compare.measures.pooled_text import PooledText
from tests.gates import a_gate
from tests.server.engines.transformers_engine.test_numerics import PROMPTS, OnEngine, greedy

TOLERANCE_NATS = 1e-3
WEIGHTS = {"llama": 2.0, "red": 1.0, "deep": 1.0}
GATED = {
    "share": Mixture(WEIGHTS, "posterior", 0.02, gate=a_gate(WEIGHTS, 0.02)),
    "learnt share": Mixture(WEIGHTS, "posterior", "auto", gate=a_gate(WEIGHTS, "auto")),
}


def sampled(prompt: str, max_tokens: int = 12, seed: int = 5) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, ignore_eos=True, seed=seed)
    return GenerationRequest(prompt=prompt, sampling=sampling, top_logprobs=2, explain=True)


def weights_of(answer: Answer) -> np.ndarray:
    """(T, K)"""
    return np.array([[view.weight for view in (token.members or {}).values()] for token in answer.choices[0].tokens])


async def scored(engine, mixture: Mixture, token_ids) -> PooledText:
    text = PooledText(mixture, {name: row for row, name in enumerate(mixture.weights)})
    await engine.visit_logprobs(list(mixture.weights), token_ids, text.take)
    return text


@pytest.mark.parametrize("name", GATED)
async def test_what_is_drawn_has_the_numbers_with_which_the_text_is_scored(engine, name):
    mixture = GATED[name]
    for request in (greedy(PROMPTS[2], 12), sampled(PROMPTS[2])):
        answer = await collect(OnEngine(engine, mixture), request)
        assert answer.prompt is not None
        text = await scored(engine, mixture, [*answer.prompt.token_ids, *answer.choices[0].token_ids])
        num_new = len(answer.choices[0].token_ids)
        found = [token.logprob for token in answer.choices[0].tokens]
        assert found == pytest.approx(text.logprobs[-num_new:], abs=TOLERANCE_NATS)
        assert np.abs(weights_of(answer) - text.weights[:, -num_new:].T).max() < TOLERANCE_NATS
        if request.prompt_logprobs is not None:
            given = [token.logprob for token in answer.prompt.tokens[1:]]
            assert given == pytest.approx(text.logprobs[:-num_new], abs=TOLERANCE_NATS)


async def test_a_gate_moves_the_weights_and_one_that_learnt_nothing_does_not(engine):
    plain = Mixture(WEIGHTS, "posterior", 0.02)
    answers = [
        await collect(OnEngine(engine, mixture), greedy(PROMPTS[0], 6))
        for mixture in (plain, replace(plain, gate=a_gate(WEIGHTS, 0.02, size=0.0)), GATED["share"])
    ]
    before, same, moved = (weights_of(answer) for answer in answers)
    assert np.abs(before - same).max() < 1e-6
    assert np.abs(before[0] - moved[0]).max() > 0.01
    assert moved.sum(axis=1) == pytest.approx(1)
    weights = (answers[2].done.trace or {})["weights"]
    assert list(weights) == ["prior", "after_prompt", "drawn"]
    assert list(weights["drawn"].values()) == pytest.approx(moved.mean(axis=0), abs=1e-6)


async def test_others_that_join_and_leave_change_nothing(engine):
    requests = [sampled(PROMPTS[n % 4], 6 + 3 * n, seed=n) for n in range(4)]
    alone = [await collect(OnEngine(engine, GATED["share"]), request) for request in requests]
    mixtures = [GATED["share"], Mixture(WEIGHTS, "posterior", 0.02), GATED["learnt share"]]
    together = await asyncio.gather(
        *(collect(OnEngine(engine, GATED["share"]), request) for request in requests),
        *(collect(OnEngine(engine, mixture), sampled(PROMPTS[1])) for mixture in mixtures),
    )
    for one, other in zip(alone, together[:4], strict=True):
        assert one.choices[0].token_ids == other.choices[0].token_ids
        assert np.abs(weights_of(one) - weights_of(other)).max() < TOLERANCE_NATS


async def test_a_prompt_that_is_read_in_pieces_or_known_already_gives_the_same(engine, running):
    with running(only=WEIGHTS, prefill_chunk=16, drafts="text") as other:
        first, again = [await collect(OnEngine(other, GATED["share"]), sampled(PROMPTS[2])) for _ in range(2)]
    expected = await collect(OnEngine(engine, GATED["share"]), sampled(PROMPTS[2]))
    for answer in (first, again):
        assert answer.choices[0].token_ids == expected.choices[0].token_ids
        assert np.abs(weights_of(answer) - weights_of(expected)).max() < TOLERANCE_NATS


def test_members_that_are_averaged_over_bytes_are_refused_by_name(mixed):
    apart = next(
        dict.fromkeys(pair, 1.0)
        for pair in itertools.combinations(mixed._members, 2)
        if mixed.averages_over(Mixture(dict.fromkeys(pair, 1.0))) == "bytes"
    )
    gated = Mixture(apart, "posterior", 0.05, gate=a_gate(apart))
    with pytest.raises(ModelLoadError, match="gate: members of different vocabularies"):
        mixed.check(gated)
