"""Prompts that begin alike: read once, answered as if each had been read alone."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Answer, GenerationRequest, Mixture, Sampling, collect
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.prefix_cache import BLOCK, Block, PrefixCache, block_keys
from tests.server.engines.transformers_engine.test_numerics import MIXTURES, TOLERANCE_NATS, OnEngine, check_against
from tests.thinned import first_fast

SHOTS = tuple(np.random.default_rng(1).integers(3, 320, 3 * BLOCK + 5).tolist())
QUESTIONS = [tuple(np.random.default_rng(seed).integers(3, 320, 11).tolist()) for seed in range(10, 14)]
MIX = Mixture({"llama": 1, "deep": 2})


def shot(question: tuple[int, ...], **fields: object) -> GenerationRequest:
    sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    return GenerationRequest(prompt=SHOTS + question, sampling=sampling, top_logprobs=3, explain=True, **fields)


def check_answer(reference, mixture: Mixture, answer: Answer) -> None:
    """Every generated token and its weights equal the reference's. (With prompt logprobs no prompt is cut short.)"""
    prompt_ids, choice = list(answer.prompt.token_ids), answer.choices[0]
    logprobs, weights = reference(mixture.pool, mixture.weights, prompt_ids + choice.token_ids, mixture.share)
    for t, token in enumerate(choice.tokens, start=len(prompt_ids) - 1):
        assert token.logprob == pytest.approx(logprobs[t, token.token_id], abs=TOLERANCE_NATS)
        assert logprobs[t].max() - logprobs[t, token.token_id] <= TOLERANCE_NATS
        assert [view.weight for view in token.members.values()] == pytest.approx(weights[:, t], abs=TOLERANCE_NATS)


class Counted:
    """What an engine's steps did, summed up: pass `see` as `on_step`."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.most_bytes = 0

    def see(self, step: StepStats) -> None:
        for total, new in ((self.read, step.num_tokens), (self.cached, step.num_cached_tokens)):
            for member, num_tokens in new.items():
                total[member] = total.get(member, 0) + num_tokens
        self.most_bytes = max(self.most_bytes, step.prefix_cache_bytes)


@pytest.mark.parametrize("prefill_chunk", first_fast([40, 7, 512]))
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
async def test_each_mixture_equals_the_reference_after_a_shared_prefix(running, reference, mixture, prefill_chunk):
    counted = Counted()
    with running(prefill_chunk=prefill_chunk, on_step=counted.see) as engine:
        model = OnEngine(engine, mixture)
        first = await collect(model, shot(QUESTIONS[0]))
        together = await asyncio.gather(*(collect(model, shot(question)) for question in QUESTIONS[1:]))
    for answer in (first, *together):
        check_answer(reference, mixture, answer)
    evidence = mixture.pool == "posterior"  # the last known token judges the next one, so it is read again
    assert counted.cached == dict.fromkeys(mixture.weights, 3 * (3 * BLOCK - evidence))


@pytest.mark.parametrize("mixture", [MIX, MIXTURES["posterior"]], ids=["arithmetic", "posterior"])
async def test_of_requests_that_arrive_together_one_reads_the_prefix(running, reference, mixture):
    counted = Counted()
    with running(prefill_chunk=40, on_step=counted.see) as engine:
        answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), shot(q)) for q in QUESTIONS))
    for answer in answers:
        check_answer(reference, mixture, answer)
    known = 3 * BLOCK - (mixture.pool == "posterior")
    prompt = len(SHOTS) + len(QUESTIONS[0])
    assert counted.cached == dict.fromkeys(mixture.weights, 3 * known)
    assert counted.read == dict.fromkeys(mixture.weights, 4 * prompt - 3 * known + 4 * 5)


async def test_the_same_prompt_again_is_read_from_its_last_token_on(running, reference):
    counted = Counted()
    with running(on_step=counted.see) as engine:
        whole = SHOTS[: 3 * BLOCK]
        request = GenerationRequest(prompt=whole, sampling=Sampling(temperature=0, max_tokens=3, ignore_eos=True))
        first = await collect(OnEngine(engine, MIX), request)
        again = await collect(OnEngine(engine, MIX), request)
    assert first.choices[0].token_ids == again.choices[0].token_ids
    assert counted.cached == dict.fromkeys(MIX.weights, 3 * BLOCK - 1)


async def test_evidence_is_not_taken_from_prompts_that_gathered_none(running, reference):
    """A plain prompt leaves no evidence: a posterior one reads the prefix again, and leaves it for the next."""
    counted, posterior = Counted(), MIXTURES["posterior"]
    with running(on_step=counted.see) as engine:
        await collect(OnEngine(engine, Mixture({"llama": 1, "deep": 1, "gemma": 1})), shot(QUESTIONS[0]))
        check_answer(reference, posterior, await collect(OnEngine(engine, posterior), shot(QUESTIONS[1])))
        assert counted.cached == {}
        check_answer(reference, posterior, await collect(OnEngine(engine, posterior), shot(QUESTIONS[2])))
    assert counted.cached == dict.fromkeys(posterior.weights, 3 * BLOCK - 1)


async def test_members_join_a_prefix_that_only_some_of_them_know(running, reference):
    known_by_one = Mixture({"llama": 1})
    for mixture in (MIX, Mixture({"llama": 1, "deep": 1}, "posterior", 0.01)):
        with running() as engine:
            for question, warm in zip(
                QUESTIONS, (known_by_one, Mixture({"llama": 1, "red": 1}, "posterior")), strict=False
            ):
                await collect(OnEngine(engine, warm), shot(question))
            check_answer(reference, mixture, await collect(OnEngine(engine, mixture), shot(QUESTIONS[2])))


async def test_prompt_logprobs_are_computed_for_every_token(running, reference):
    with running() as engine:
        for mixture in (MIX, MIXTURES["posterior"]):
            model = OnEngine(engine, mixture)
            await collect(model, shot(QUESTIONS[0]))
            answer = await collect(model, shot(QUESTIONS[1], prompt_logprobs=2))
            assert len(answer.prompt.tokens) == len(SHOTS) + len(QUESTIONS[1])
            check_against(reference, mixture, answer)


async def test_views_of_one_conversation_each_continue_their_own_prefix(running, reference, members):
    """The same weights read two renderings; each finds the one it has read before, with its own evidence."""
    mixture = Mixture({"llama": 1, "polite": 1, "deep": 2}, "posterior", 0.05)

    def conversation(question: str) -> GenerationRequest:
        messages = ({"role": "user", "content": "To be, or not to be. " * 5 + question},)
        sampling = Sampling(temperature=0, max_tokens=3, ignore_eos=True)
        return GenerationRequest(messages=messages, sampling=sampling, explain=True)

    counted = Counted()
    with running(on_step=counted.see) as engine:
        await collect(OnEngine(engine, mixture), conversation("Why?"))
        warm = await collect(OnEngine(engine, mixture), conversation("Where?"))
    with running(prefix_cache_bytes=0) as engine:
        cold = await collect(OnEngine(engine, mixture), conversation("Where?"))
    assert set(counted.cached) == set(mixture.weights)
    for one, other in zip(warm.choices[0].tokens, cold.choices[0].tokens, strict=True):
        assert one.token_id == other.token_id
        for name, view in one.members.items():
            assert view.weight == pytest.approx(other.members[name].weight, abs=TOLERANCE_NATS)
            assert view.logprob == pytest.approx(other.members[name].logprob, abs=TOLERANCE_NATS)


@pytest.mark.slow
async def test_a_follower_reads_on_when_its_leader_leaves(running, reference):
    with running(prefill_chunk=2) as engine:
        leader = asyncio.create_task(collect(OnEngine(engine, MIX), shot(QUESTIONS[0])))
        await asyncio.sleep(0.03)
        follower = asyncio.create_task(collect(OnEngine(engine, MIX), shot(QUESTIONS[1])))
        await asyncio.sleep(0.03)
        assert not leader.done()
        leader.cancel()
        check_answer(reference, MIX, await follower)


@pytest.mark.parametrize("num_blocks", [0, 1, 4, 9])
async def test_memory_stays_within_its_bound_and_answers_right(running, reference, members, num_blocks):
    per_block = 2 * 2 * 2 * BLOCK * 8 * 4  # llama: layers, keys and values, heads, tokens, dim, bytes of a float32
    bound, counted = num_blocks * per_block, Counted()
    mixture = Mixture({"llama": 1})
    with running(prefix_cache_bytes=bound, prefill_chunk=50, on_step=counted.see) as engine:
        for _ in range(2):
            answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), shot(q)) for q in QUESTIONS))
            for answer in answers:
                check_answer(reference, mixture, answer)
    assert counted.most_bytes <= bound
    assert (counted.cached.get("llama", 0) > 0) == (num_blocks > 0)


def block(num_bytes: int, evidence: np.ndarray | None = None) -> Block:
    half = torch.zeros(num_bytes // 8)
    return Block({0: (half, half)}, evidence)


def test_the_least_recently_used_goes_first_and_leaves_before_roots(members) -> None:
    cache = PrefixCache(3 * 80)
    left = block_keys(members["llama"], (1,) * BLOCK + (2,) * BLOCK)
    right = block_keys(members["llama"], (1,) * BLOCK + (3,) * BLOCK)
    assert left[0] == right[0] and left[1] != right[1]
    for place in range(2):
        cache.keep(left[: place + 1], block(80))
    cache.keep(right, block(80))
    cache.keep(block_keys(members["llama"], (9,) * BLOCK), block(80))
    found = [len(cache.find(keys, with_evidence=False)) for keys in (left, right)]
    assert found == [1, 2]
    assert cache.num_bytes == 3 * 80


def test_keys_tell_members_on_other_weights_or_adapters_apart(members) -> None:
    keys = {name: block_keys(members[name], SHOTS) for name in ("llama", "polite", "red", "deep")}
    assert keys["llama"] == keys["polite"]
    assert len({keys[name][0] for name in keys}) == 3
    assert all(len(chain) == len(SHOTS) // BLOCK for chain in keys.values())


def test_a_block_larger_than_the_cache_is_not_kept(members) -> None:
    cache = PrefixCache(40)
    cache.keep(block_keys(members["llama"], SHOTS)[:1], block(80))
    assert cache.num_bytes == 0
