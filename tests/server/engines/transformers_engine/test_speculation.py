"""Drafts change how fast an answer comes, and nothing of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Answer, GenerationRequest, Grammar, Mixture, Sampling, collect
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.choice import Draft, LiveChoice
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.member_drafts import drafter_of
from ensemble_server.server.engines.transformers_engine.speculation import Speculation
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts
from ensemble_server.server.engines.transformers_engine.trust import Trust
from tests.server.engines.transformers_engine.test_numerics import MIXTURES, PROMPTS, OnEngine, check_against, greedy
from tests.thinned import first_fast

TOLERANCE_NATS = 1e-3
DRAFTED = [
    MIXTURES[name]
    for name in (
        "single sliding window",
        "arithmetic, other depths and head counts",
        "geometric, contrastive",
        "posterior with share",
        "posterior with a learnt share",
    )
]
NARROW = dict.fromkeys(range(60, 64), 100.0)  # of four tokens, so that what comes repeats


class Drafting:
    """An engine that reads ahead whenever it can, and what came of it."""

    def __init__(self, engine: TransformersEngine, steps: list[StepStats], source: str) -> None:
        self.engine, self.steps, self.source = engine, steps, source

    @property
    def num_drafted(self) -> int:
        return sum(step.num_drafted.get(self.source, 0) for step in self.steps)

    @property
    def num_accepted(self) -> int:
        return sum(step.num_accepted.get(self.source, 0) for step in self.steps)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further tokens cost nothing, so that all that can be drafted is."""
    monkeypatch.setattr(StepCosts, "seconds", lambda self, num_tokens: np.ones(len(num_tokens)))


@pytest.fixture(params=["text", "member"])
def drafting(running, eager, request, monkeypatch) -> Iterator[Drafting]:
    """With drafts from the text, and with those from members alone, where there are any."""
    if request.param == "member":
        monkeypatch.setattr(LiveChoice, "from_text", lambda self, max_tokens: [])
    steps: list[StepStats] = []
    with running(drafts=request.param, on_step=steps.append) as engine:
        yield Drafting(engine, steps, request.param)


def sampled(prompt: str = PROMPTS[2], **sampling: object) -> GenerationRequest:
    settings = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True, "seed": 5, "logit_bias": NARROW}
    return GenerationRequest(prompt=prompt, sampling=Sampling(**settings | sampling), top_logprobs=2, explain=True)


def check_equal(ours: Answer, theirs: Answer) -> None:
    """The same tokens, and numbers that differ by rounding alone."""
    assert len(ours.choices) == len(theirs.choices)
    for one, other in zip(ours.choices, theirs.choices, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        for token, expected in zip(one.tokens, other.tokens, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=TOLERANCE_NATS)
            for name, view in (token.members or {}).items():
                assert view.logprob == pytest.approx(expected.members[name].logprob, abs=TOLERANCE_NATS)
                assert view.weight == pytest.approx(expected.members[name].weight, abs=TOLERANCE_NATS)
    assert ours.done.usage == theirs.done.usage


async def test_greedy_answers_equal_the_reference_and_those_without_drafts(engine, drafting, reference):
    for mixture in DRAFTED:
        request = greedy(PROMPTS[2], 24)
        answer = await collect(OnEngine(drafting.engine, mixture), request)
        check_against(reference, mixture, answer)
        check_equal(answer, await collect(OnEngine(engine, mixture), request))
    assert 0 < drafting.num_accepted < drafting.num_drafted


async def test_seeded_answers_equal_those_without_drafts(engine, drafting):
    for mixture in DRAFTED:
        request = sampled(temperature=2.0, max_tokens=24)
        ours, theirs = [await collect(OnEngine(each, mixture), request) for each in (drafting.engine, engine)]
        check_equal(ours, theirs)
    assert 0 < drafting.num_accepted < drafting.num_drafted


@pytest.mark.parametrize(
    "sampling",
    first_fast(
        [
            {"top_p": 0.6},
            {"top_k": 3, "min_p": 0.1},
            {"presence_penalty": 1.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
            {"stop_token_ids": (61,), "min_tokens": 9},
            {"max_tokens": 1},
            {"max_tokens": 2},
            {"temperature": 0, "logit_bias": {}},
        ],
        3,
    ),
    ids=str,
)
async def test_every_control_acts_as_without_drafts(engine, drafting, sampling):
    mixture = MIXTURES["posterior with share"]
    request = sampled(**sampling)
    check_equal(*[await collect(OnEngine(each, mixture), request) for each in (drafting.engine, engine)])


async def test_stop_strings_end_an_answer_in_the_middle_of_a_draft(engine, drafting):
    mixture = MIXTURES["geometric"]
    whole = await collect(OnEngine(engine, mixture), greedy(PROMPTS[2], 40))
    for begin in (10, 17, 23):
        stop = whole.text[begin : begin + 3]
        request = greedy(PROMPTS[2], 40)
        request = replace(request, sampling=replace(request.sampling, stop=(stop,)))
        check_equal(*[await collect(OnEngine(each, mixture), request) for each in (drafting.engine, engine)])


@pytest.mark.slow
async def test_structured_output_is_what_it_is_without_drafts(engine, drafting):
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
            "required": ["ok", "kind"],
            "additionalProperties": False,
        },
        "minItems": 3,
        "maxItems": 5,
    }
    request = sampled(
        grammar=Grammar("json_schema", json.dumps(schema)), max_tokens=200, ignore_eos=False, logit_bias={}
    )
    mixture = MIXTURES["posterior"]
    ours, theirs = [await collect(OnEngine(each, mixture), request) for each in (drafting.engine, engine)]
    check_equal(ours, theirs)
    assert len(json.loads(ours.text)) >= 3
    assert drafting.num_accepted > 0


@pytest.mark.slow
async def test_choices_of_one_request_draft_each_for_itself(engine, drafting):
    request = replace(sampled(), n=5)
    mixture = MIXTURES["posterior"]
    check_equal(*[await collect(OnEngine(each, mixture), request) for each in (drafting.engine, engine)])
    assert drafting.num_accepted > 0


@pytest.mark.slow
async def test_rows_with_and_without_drafts_share_a_batch(engine, drafting):
    jobs = [
        (mixture, replace(sampled(prompt, seed=seed, max_tokens=8 + 3 * seed), priority=seed % 2))
        for seed, (mixture, prompt) in enumerate(zip(MIXTURES.values(), PROMPTS * 3, strict=False))
    ]
    ours, theirs = [
        await asyncio.gather(*(collect(OnEngine(each, mixture), request) for mixture, request in jobs))
        for each in (drafting.engine, engine)
    ]
    for one, other in zip(ours, theirs, strict=True):
        check_equal(one, other)
    assert drafting.num_accepted > 0


async def test_a_draft_makes_fewer_steps_and_counts_what_members_forwarded(drafting):
    request = replace(greedy("ab" * 20, 30), explain=False, top_logprobs=None, prompt_logprobs=None)
    mixture = Mixture({"llama": 0.6, "deep": 0.2, "qwen": 0.2})
    answer = await collect(OnEngine(drafting.engine, mixture), request)
    assert len(answer.choices[0].token_ids) == 30
    accepted, drafted = drafting.num_accepted, drafting.num_drafted
    assert accepted > 0
    assert len(drafting.steps) == 30 - accepted
    for name in mixture.weights:
        forwarded = sum(step.num_tokens.get(name, 0) for step in drafting.steps)
        assert forwarded == answer.done.usage.prompt_tokens + 29 - accepted + drafted


@pytest.mark.slow
async def test_what_was_drafted_wrongly_leaves_no_trace_in_the_cache(drafting, members, monkeypatch):
    """Keys and values of every token are those of a member that reads the text in one go."""
    seen: list[tuple[LiveChoice, int]] = []

    def watch(self: Speculation, choice: LiveChoice, draft: Draft, num_right: int) -> None:
        seen.append((choice, len(draft.token_ids) - num_right))

    monkeypatch.setattr(Speculation, "count", watch)
    mixture = MIXTURES["arithmetic, five families"]
    answer = await collect(OnEngine(drafting.engine, mixture), sampled(max_tokens=40, temperature=5.0))
    text = [*answer.prompt.token_ids, *answer.choices[0].token_ids[:-1]]
    for name, cache in zip(mixture.weights, seen[-1][0].caches, strict=True):
        plain = RowCache()
        members[name].backbone.forward([Span(plain, text, 1)])
        ours, theirs = [each.copy_of(0, len(text)) for each in (cache, plain)]
        for layer, (keys, values) in theirs.items():
            assert torch.allclose(ours[layer][0], keys, atol=1e-4)
            assert torch.allclose(ours[layer][1], values, atol=1e-4)
    assert sum(num_wrong for _, num_wrong in seen) > 10


@pytest.mark.slow
async def test_draws_follow_the_mixtures_distribution(drafting, reference, members):
    """χ² of 1,000 answers of three tokens, among three tokens: 27 outcomes, each behind a text that is drafted from."""
    from scipy.stats import chisquare

    mixture = MIXTURES["arithmetic, other depths and head counts"]
    allowed = [60, 61, 62]
    prompt_ids = tuple(members["llama"].surface.encode(PROMPTS[0])) + (60, 61, 62, 60, 61, 60, 62, 61) * 2
    counts = np.zeros((3, 3, 3))
    bias = dict.fromkeys(allowed, 100.0)
    for seed in range(10):
        sampling = Sampling(max_tokens=3, temperature=1.0, ignore_eos=True, seed=seed, logit_bias=bias)
        request = GenerationRequest(prompt=prompt_ids, n=100, sampling=sampling)
        for choice in (await collect(OnEngine(drafting.engine, mixture), request)).choices:
            counts[tuple(token_id - 60 for token_id in choice.token_ids)] += 1
    expected = np.zeros((3, 3, 3))
    for a in range(3):
        for b in range(3):
            text = [*prompt_ids, 60 + a, 60 + b, 60]
            logprobs, _ = reference(mixture.pool, mixture.weights, text, mixture.share)
            rows = np.exp(logprobs[len(prompt_ids) - 1 :, 60:63])
            rows /= rows.sum(-1, keepdims=True)
            expected[a, b] = rows[0, a] * rows[1, b] * rows[2]
    seen, wanted = counts.ravel(), expected.ravel() * counts.sum()
    enough = wanted >= 5
    merged = [np.append(row[enough], row[~enough].sum()) for row in (seen, wanted)]
    merged = [row if merged[1][-1] > 0 else row[:-1] for row in merged]
    assert chisquare(*merged).pvalue > 1e-3
    assert 0 < drafting.num_accepted < drafting.num_drafted


@pytest.mark.parametrize("drafts", ["text", "member"])
async def test_nothing_is_drafted_where_further_tokens_cost_more_than_they_bring(running, monkeypatch, drafts):
    monkeypatch.setattr(StepCosts, "seconds", lambda self, num_tokens: np.asarray(num_tokens, dtype=float))
    steps: list[StepStats] = []
    with running(drafts=drafts, on_step=steps.append) as engine:
        await collect(OnEngine(engine, MIXTURES["geometric"]), greedy(PROMPTS[2], 20))
    assert sum(sum(step.num_drafted.values()) for step in steps) == 0


async def test_members_of_the_same_weights_draft_from_their_text_alone(running, eager):
    steps: list[StepStats] = []
    with running(drafts="member", on_step=steps.append) as engine:
        await collect(OnEngine(engine, MIXTURES["arithmetic, base and adapters"]), greedy(PROMPTS[2], 20))
    assert {source for step in steps for source in step.num_drafted} == {"text"}


async def test_a_member_whose_weights_are_lightest_writes(members):
    asked = [members["deep"], members["llama"], members["gpt2"]]
    sizes = [member.backbone.num_parameters for member in asked]
    assert drafter_of(asked, np.array([0.4, 0.3, 0.3])) == int(np.argmin(sizes))
    assert drafter_of([members["llama"], members["red"]], np.array([0.5, 0.5])) is None
    twins = [members["llama"], members["deep"], members["red"]]
    assert drafter_of(twins, np.array([0.2, 0.3, 0.5])) == 2, "of equal ones that with the most weight"
    assert drafter_of(twins, np.array([-0.5, 1.0, 0.5])) == 2
    assert drafter_of(twins, np.array([-0.5, 1.5, -0.2])) == 1


def test_trust_follows_what_was_right_and_comes_back_in_time():
    trust = Trust()
    first = trust.chance
    for _ in range(20):
        trust.observe(4, 0)
    assert trust.chance < 0.3
    for _ in range(20):
        trust.observe(4, 4)
    assert trust.chance > 0.9
    for _ in range(20):
        trust.observe(4, 0)
    for _ in range(600):
        trust.rest()
    assert trust.chance == pytest.approx(first, abs=0.05)
