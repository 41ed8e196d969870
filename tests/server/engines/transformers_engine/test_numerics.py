"""What the engine says against the float32 reference, to 1e-3 nats, in every way of batching it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np
import pytest

from ensemble_server.ensembles.base import Answer, GenerationRequest, Mixture, Sampling, collect
from ensemble_server.ensembles.pooling import effective_weights, posterior
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from tests.thinned import first_fast

TOLERANCE_NATS = 1e-3
PROMPTS = ("To be, or not", "def f(x):", "The quick brown fox jumps over the lazy dog. " * 3, "数学 😀")
MIXTURES = {
    "single llama": Mixture({"llama": 1.0}),
    "single sliding window": Mixture({"gemma": 1.0}),
    "single adapter": Mixture({"red": 1.0}),
    "arithmetic, other depths and head counts": Mixture({"llama": 0.2, "deep": 0.5, "qwen": 0.3}),
    "arithmetic, five families": Mixture({"llama": 1, "deep": 2, "qwen": 1, "gpt2": 3, "gemma": 1}),
    "arithmetic, base and adapters": Mixture({"llama": 1, "red": 1, "green": 2, "blue": 0.5}),
    "geometric": Mixture({"llama": 1, "gpt2": 2, "gemma": 1}, "geometric"),
    "geometric, contrastive": Mixture({"red": 1, "llama": 1, "deep": -0.7}, "geometric"),
    "posterior": Mixture({"llama": 1, "deep": 1, "gemma": 1}, "posterior"),
    "posterior with share": Mixture({"llama": 2, "red": 1, "gpt2": 1}, "posterior", 0.02),
    "posterior with a learnt share": Mixture({"llama": 1, "red": 2, "deep": 1}, "posterior", "auto"),
}


class OnEngine:
    """One mixture as a model."""

    name = "mixture"
    max_model_len: int | None = None
    explains_tokens, fan_out = True, 1

    def __init__(self, engine: TransformersEngine, mixture: Mixture) -> None:
        self.engine, self.mixture, self.members = engine, mixture, tuple(mixture.weights)

    def generate(self, request: GenerationRequest):
        return self.engine.generate(self.mixture, request, method="test")


def greedy(prompt: str, max_tokens: int = 8, **fields: object) -> GenerationRequest:
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(
        prompt=prompt, sampling=sampling, top_logprobs=3, explain=True, prompt_logprobs=2, **fields
    )


def check_against(reference, mixture: Mixture, answer: Answer) -> None:
    """Every number of the answer equals the reference's on the same tokens, and each greedy token is its argmax."""
    prompt_ids = list(answer.prompt.token_ids)
    choice = answer.choices[0]
    text = prompt_ids + choice.token_ids
    logprobs, weights = reference(mixture.pool, mixture.weights, text, mixture.share)
    alone = {name: reference("arithmetic", {name: 1}, text)[0] for name in mixture.weights}
    for t, token in enumerate([*answer.prompt.tokens, *choice.tokens]):
        assert token.token_id == text[t]
        if t == 0:
            assert token.logprob is None
            continue
        expected = logprobs[t - 1]
        assert token.logprob == pytest.approx(expected[text[t]], abs=TOLERANCE_NATS)
        for alternative in token.top:
            assert alternative.logprob == pytest.approx(expected[alternative.token_id], abs=TOLERANCE_NATS)
        assert token.top[0].logprob == pytest.approx(expected.max(), abs=TOLERANCE_NATS)
        if t >= len(prompt_ids):
            gap = expected.max() - expected[text[t]]
            assert gap <= TOLERANCE_NATS, f"greedy token {t} is {gap} nats below the reference's argmax"
            for k, (name, view) in enumerate(token.members.items()):
                assert view.logprob == pytest.approx(alone[name][t - 1, text[t]], abs=TOLERANCE_NATS)
                assert view.weight == pytest.approx(weights[k, t - 1], abs=TOLERANCE_NATS)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
async def test_each_mixture_equals_the_reference_one_by_one_and_batched(engine, reference, mixture):
    model = OnEngine(engine, mixture)
    alone = [await collect(model, greedy(prompt)) for prompt in PROMPTS]
    together = await asyncio.gather(*(collect(model, greedy(prompt)) for prompt in PROMPTS))
    for one, batched in zip(alone, together, strict=True):
        check_against(reference, mixture, one)
        check_against(reference, mixture, batched)
        assert one.choices[0].token_ids == batched.choices[0].token_ids


@pytest.mark.parametrize("prefill_chunk", first_fast([64, 7, 3, 1]))
async def test_prompt_chunks_of_any_size_change_nothing(running, reference, prefill_chunk):
    prompt = PROMPTS[2] if prefill_chunk > 3 else PROMPTS[2][:45]  # each chunk is a step
    with running(prefill_chunk=prefill_chunk, max_batch=3) as engine:
        mixtures = list(MIXTURES.values())
        answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), greedy(prompt)) for mixture in mixtures))
    for mixture, answer in zip(mixtures, answers, strict=True):
        check_against(reference, mixture, answer)


@pytest.mark.slow
async def test_rows_of_different_mixtures_join_and_leave_one_batch(running, reference):
    with running(max_batch=4, prefill_chunk=16) as engine:

        async def late(delay_s: float, mixture: Mixture, prompt: str, max_tokens: int) -> Answer:
            await asyncio.sleep(delay_s)
            return await collect(OnEngine(engine, mixture), greedy(prompt, max_tokens))

        jobs = [
            (0.01 * i, mixture, PROMPTS[i % len(PROMPTS)], 3 + 5 * (i % 3))
            for i, mixture in enumerate([*MIXTURES.values(), *MIXTURES.values()])
        ]
        answers = await asyncio.gather(*(late(*job) for job in jobs))
    for (_, mixture, _, max_tokens), answer in zip(jobs, answers, strict=True):
        assert len(answer.choices[0].token_ids) == max_tokens
        check_against(reference, mixture, answer)


@pytest.mark.parametrize("pool", ["arithmetic", "geometric", "posterior"])
async def test_weight_one_on_a_member_is_that_member_token_for_token(engine, pool):
    single = await collect(OnEngine(engine, Mixture({"deep": 1.0})), greedy(PROMPTS[0], 20))
    mixed = await collect(OnEngine(engine, Mixture({"deep": 3.0}, pool)), greedy(PROMPTS[0], 20))
    assert mixed.choices[0].token_ids == single.choices[0].token_ids
    assert [t.logprob for t in mixed.choices[0].tokens] == [t.logprob for t in single.choices[0].tokens]


@pytest.mark.parametrize("pool", ["arithmetic", "geometric", "posterior"])
async def test_copies_of_one_model_are_that_model_token_for_token(tiny, pool):
    from pathlib import Path

    from ensemble_server.server.config.blocks import HostedModel
    from ensemble_server.server.engines.transformers_engine.members import load_members
    from ensemble_server.server.weights.member_views import read_member_files

    models = {name: HostedModel(path=str(tiny["qwen"])) for name in ("one", "two")}
    models["three"] = HostedModel(base="one")
    engine = TransformersEngine(load_members(models, read_member_files(models, relative_to=Path(), max_context=128)))
    engine.start()
    try:
        single = await collect(OnEngine(engine, Mixture({"one": 1})), greedy(PROMPTS[1], 30))
        copies = await collect(
            OnEngine(engine, Mixture({"one": 1, "two": 2, "three": 1}, pool)), greedy(PROMPTS[1], 30)
        )
    finally:
        engine.stop()
    assert copies.choices[0].token_ids == single.choices[0].token_ids
    difference = np.subtract(
        [t.logprob for t in copies.choices[0].tokens], [t.logprob for t in single.choices[0].tokens]
    )
    assert np.abs(difference).max() < 1e-5


async def test_members_with_views_of_their_own_differ_in_prompt_and_agree_in_text(engine, members, reference):
    """Each member reads its own rendering of the conversation, with positions of its own."""
    conversation = ({"role": "user", "content": "Hello"},)
    mixture = Mixture({"llama": 1.5, "polite": -0.5}, "geometric")  # classifier-free guidance between two views
    request = GenerationRequest(
        messages=conversation, sampling=Sampling(temperature=0, max_tokens=10, ignore_eos=True), top_logprobs=0
    )
    answer = await collect(OnEngine(engine, mixture), request)
    choice = answer.choices[0]
    expected = None
    for name, weight in mixture.weights.items():
        prompt = members[name].surface.render(conversation)
        assert answer.done.usage.members[name].prompt_tokens == len(prompt)
        rows = reference("arithmetic", {name: 1}, prompt + choice.token_ids)[0][len(prompt) - 1 : -1]
        expected = weight * rows + (0 if expected is None else expected)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    for row, token in zip(expected, choice.tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=TOLERANCE_NATS)
        assert row.max() - row[token.token_id] <= TOLERANCE_NATS
    lengths = {name: usage.prompt_tokens for name, usage in answer.done.usage.members.items()}
    assert lengths["polite"] > lengths["llama"]


async def test_evidence_of_different_views_is_their_common_end(engine, members, reference):
    conversation = ({"role": "user", "content": "Hello, def f(x)"},)
    mixture = Mixture({"llama": 1, "polite": 1, "deep": 2}, "posterior", 0.05)
    request = GenerationRequest(
        messages=conversation, sampling=Sampling(temperature=0, max_tokens=1, ignore_eos=True), explain=True
    )
    token = (await collect(OnEngine(engine, mixture), request)).choices[0].tokens[0]
    prompts = {name: members[name].surface.render(conversation) for name in mixture.weights}
    assert prompts["polite"][-len(prompts["llama"]) :] == prompts["llama"] == prompts["deep"]
    length = len(prompts["llama"]) - 1  # nothing predicts a first token
    evidence = []
    for name, ids in prompts.items():
        rows = reference("arithmetic", {name: 1}, ids)[0]
        everything = np.array([rows[t - 1, ids[t]] for t in range(1, len(ids))])
        evidence.append(everything[-length:])
    prior = effective_weights(list(mixture.weights.values()))
    expected = posterior.track(prior, np.stack(evidence), prior, mixture.share)[:, -1]
    assert [view.weight for view in token.members.values()] == pytest.approx(expected, abs=TOLERANCE_NATS)


def total_loss(answer: Answer) -> float:
    return -sum(token.logprob for token in answer.prompt.tokens[1:])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
async def test_posterior_loses_at_most_what_the_theory_allows(engine, share):
    """Loss on a text is at most the best member's plus ln K (share 0), or plus the fixed-share bound."""
    weights: Mapping[str, float] = {"llama": 1, "deep": 1, "qwen": 1, "gpt2": 1}
    for prompt in PROMPTS:
        request = GenerationRequest(prompt=prompt, sampling=Sampling(max_tokens=0), prompt_logprobs=0)
        mixed = await collect(OnEngine(engine, Mixture(weights, "posterior", share)), request)
        alone = [await collect(OnEngine(engine, Mixture({name: 1})), request) for name in weights]
        num_tokens = len(mixed.prompt.tokens) - 1
        bound = posterior.loss_bound(1 / len(weights), num_tokens, share)
        assert share or bound == pytest.approx(np.log(len(weights)))
        assert total_loss(mixed) <= min(map(total_loss, alone)) + bound + TOLERANCE_NATS
