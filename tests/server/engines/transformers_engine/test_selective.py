"""Selective averaging: who writes which token, against a reference that reads the whole text anew for every token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from ensemble_server.ensembles.base import Answer, GenerationRequest, Grammar, Mixture, Sampling, When, collect
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine import choice as choice_module
from ensemble_server.server.engines.transformers_engine.choice import generator
from ensemble_server.server.engines.transformers_engine.lagging_members import MAX_LAG
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts
from tests.reference import pooled
from tests.server.engines.transformers_engine.test_numerics import PROMPTS, OnEngine, greedy
from tests.thinned import first_fast

TOLERANCE_NATS = 1e-3
PLAIN = {
    "weights of their own": Mixture({"llama": 0.3, "deep": 0.5, "qwen": 0.2}),
    "adapters of one base": Mixture({"llama": 2, "red": 1, "green": 1}),
    "some of each": Mixture({"llama": 2, "red": 1, "deep": 1}),
    "geometric, contrastive": Mixture({"red": 1, "llama": 1, "deep": -0.7}, "geometric"),
    "posterior": Mixture({"llama": 2, "red": 1, "deep": 1, "gpt2": 1}, "posterior", 0.02),
    "posterior, learnt share": Mixture({"llama": 1, "deep": 1.5}, "posterior", "auto"),
}
MAIN = {"weights of their own": "deep", "geometric, contrastive": "red", "posterior, learnt share": "deep"}
NEVER = {"entropy": 100.0, "disagree": 1.0}
RULES = ("entropy", "disagree")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further tokens cost nothing, so that main members draft as far as they may."""
    monkeypatch.setattr(StepCosts, "seconds", lambda self, num_tokens: np.ones(len(num_tokens)))


@pytest.fixture(params=PLAIN, ids=list(PLAIN))
def plain(request) -> Mixture:
    return PLAIN[request.param]


def test_the_main_member_is_the_heaviest_and_the_first_of_equals():
    for name, mixture in PLAIN.items():
        assert mixture.main == MAIN.get(name, "llama")
    assert Mixture({"b": 1, "a": 1}).main == "b"


def seeded(prompt: str = PROMPTS[2], **sampling: object) -> GenerationRequest:
    settings = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "seed": 5}
    return GenerationRequest(prompt=prompt, sampling=Sampling(**settings | sampling), top_logprobs=2, explain=True)


def check_same_text(ours: Answer, theirs: Answer) -> None:
    """The same tokens, with numbers that differ by rounding alone."""
    for one, other in zip(ours.choices, theirs.choices, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=TOLERANCE_NATS)


@pytest.mark.parametrize("rule", first_fast(RULES))
async def test_a_threshold_of_zero_is_the_average_token_for_token(engine, eager, plain, rule):
    for request in (greedy(PROMPTS[2], 16), seeded()):
        ours = await collect(OnEngine(engine, replace(plain, when=When(**{rule: 0}))), request)
        theirs = await collect(OnEngine(engine, plain), request)
        check_same_text(ours, theirs)
        for one, other in zip(ours.choices[0].tokens, theirs.choices[0].tokens, strict=True):
            for name, view in other.members.items():
                assert one.members[name].weight == pytest.approx(view.weight, abs=TOLERANCE_NATS)
                assert one.members[name].logprob == pytest.approx(view.logprob, abs=TOLERANCE_NATS)
        assert ours.done.usage == theirs.done.usage


@pytest.mark.parametrize("rule", RULES)
async def test_a_threshold_out_of_reach_is_the_main_member_alone(engine, eager, plain, rule):
    for request in (greedy(PROMPTS[2], 16), seeded()):
        ours = await collect(OnEngine(engine, replace(plain, when=When(**{rule: NEVER[rule]}))), request)
        check_same_text(ours, await collect(OnEngine(engine, Mixture({plain.main: 1.0})), request))
        assert all(list(token.members) == [plain.main] for token in ours.choices[0].tokens)
        written = {name: usage.completion_tokens for name, usage in ours.done.usage.members.items()}
        assert written == dict.fromkeys(plain.weights, 0) | {plain.main: len(ours.choices[0].token_ids)}


# --- against the reference -------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What the reference writes: a distribution (V,) per token, and whether it is the pool's."""

    token_ids: list[int]
    logprobs: list[np.ndarray]
    is_joint: list[bool]
    of_members: list[dict[str, np.ndarray]]
    weights: list[np.ndarray]
    margins: list[float]  # how far each decision is from the threshold


def measure(rule: str, main: np.ndarray, pool: np.ndarray) -> float:
    """What a threshold is compared with. main, pool: (V,) log-probabilities."""
    if rule == "entropy":
        probs = np.exp(main)
        return float(-(probs[probs > 0] * main[probs > 0]).sum())
    return float(np.abs(np.exp(main) - np.exp(pool)).sum() / 2)


class Rows:
    """What a text makes everybody expect behind each of its tokens: (T, V) of the pool and of every member."""

    def __init__(self, reference, mixture: Mixture, text: Sequence[int]) -> None:
        self.of_members = {name: reference("arithmetic", {name: 1}, text)[0] for name in mixture.weights}
        stacked, weights = np.stack(list(self.of_members.values())), list(mixture.weights.values())
        self.pool, self.weights = pooled(mixture.pool, stacked, weights, text, mixture.share)
        self.main = self.of_members[mixture.main]

    def measured(self, rule: str) -> list[float]:
        return [measure(rule, main, pool) for main, pool in zip(self.main, self.pool, strict=True)]


def drawn(logprobs: np.ndarray, random) -> int:
    if random is None:
        return int(logprobs.argmax())
    import torch

    uniform = torch.rand((), generator=random, dtype=torch.float64).item()
    cumulative = np.exp(logprobs).cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def written(reference, mixture: Mixture, rule: str, threshold: float, prompt: Sequence[int], seed: int | None, n: int):
    expected = Expected([], [], [], [], [], [])
    random = None if seed is None else generator(seed, 0)
    for _ in range(n):
        rows = Rows(reference, mixture, [*prompt, *expected.token_ids])
        distance = measure(rule, rows.main[-1], rows.pool[-1]) - threshold
        expected.margins.append(abs(distance))
        expected.is_joint.append(distance >= 0)
        expected.logprobs.append(rows.pool[-1] if distance >= 0 else rows.main[-1])
        expected.of_members.append({name: of_text[-1] for name, of_text in rows.of_members.items()})
        expected.weights.append(rows.weights[:, -1])
        expected.token_ids.append(drawn(expected.logprobs[-1], random))
    return expected


def mixed_text(reference, mixture: Mixture, rule: str, prompt: Sequence[int], texts, seed: int | None, n: int):
    """A threshold by which some tokens come from the pool and some do not, none by a hair, and what is written; None
    where there is none."""
    seen = sorted(
        value
        for text in texts
        for value in Rows(reference, mixture, [*prompt, *text]).measured(rule)[len(prompt) - 1 :]
    )
    for part in (0.5, 0.35, 0.65, 0.2, 0.8, 0.1, 0.9):
        place = int(part * (len(seen) - 1))
        threshold = (seen[place] + seen[place + 1]) / 2
        expected = written(reference, mixture, rule, threshold, prompt, seed, n)
        if 0 < sum(expected.is_joint) < n and min(expected.margins) > 1e-5:
            return threshold, expected
    return None


@pytest.mark.parametrize("seed", first_fast([None, 3]), ids=["greedy", "seeded"])
@pytest.mark.parametrize("rule", RULES)
async def test_a_threshold_between_writes_what_the_reference_writes(
    engine, eager, reference, members, plain, rule, seed
):
    n = 12
    sampling = Sampling(temperature=0.0 if seed is None else 1.0, seed=seed, max_tokens=n, ignore_eos=True)
    for text in PROMPTS:  # until one has tokens of both kinds
        prompt = members["llama"].surface.encode(text)
        request = GenerationRequest(prompt=tuple(prompt), sampling=sampling, top_logprobs=3, explain=True)
        others = [await collect(OnEngine(engine, each), request) for each in (plain, Mixture({plain.main: 1.0}))]
        texts = [answer.choices[0].token_ids for answer in others]
        if (found := mixed_text(reference, plain, rule, prompt, texts, seed, n)) is not None:
            break
    assert found is not None, "no threshold tells tokens of these texts apart"
    threshold, expected = found
    answer = await collect(OnEngine(engine, replace(plain, when=When(**{rule: threshold}))), request)
    assert answer.choices[0].token_ids == expected.token_ids
    for t, token in enumerate(answer.choices[0].tokens):
        assert token.logprob == pytest.approx(expected.logprobs[t][token.token_id], abs=TOLERANCE_NATS)
        for top in token.top:
            assert top.logprob == pytest.approx(expected.logprobs[t][top.token_id], abs=TOLERANCE_NATS)
        assert list(token.members) == (list(plain.weights) if expected.is_joint[t] else [plain.main])
        for name, view in token.members.items():
            gave = expected.of_members[t][name][token.token_id]
            assert view.logprob == pytest.approx(gave, abs=TOLERANCE_NATS)
        weights = expected.weights[t] if expected.is_joint[t] else np.ones(1)
        assert [view.weight for view in token.members.values()] == pytest.approx(weights, abs=TOLERANCE_NATS)
    joint = sum(expected.is_joint)
    assert answer.done.trace["when"] == {rule: threshold, "main": plain.main, "tokens": n, "pooled_tokens": joint}
    completion = {name: usage.completion_tokens for name, usage in answer.done.usage.members.items()}
    assert completion == dict.fromkeys(plain.weights, joint) | {plain.main: n}


@pytest.mark.parametrize("rule", RULES)
async def test_log_probabilities_of_a_prompt_follow_the_rule(engine, reference, plain, rule):
    request = replace(greedy(PROMPTS[2], 1), explain=False)
    ids = list((await collect(OnEngine(engine, plain), request)).prompt.token_ids)
    rows = Rows(reference, plain, ids)
    measured = rows.measured(rule)[:-1]
    ordered = sorted(measured)
    half = len(ordered) // 2
    threshold = (ordered[half - 1] + ordered[half]) / 2
    answer = await collect(OnEngine(engine, replace(plain, when=When(**{rule: threshold}))), request)
    for t, token in enumerate(answer.prompt.tokens[1:]):
        if abs(measured[t] - threshold) > 1e-5:
            row = rows.pool[t] if measured[t] >= threshold else rows.main[t]
            assert token.logprob == pytest.approx(row[ids[t + 1]], abs=TOLERANCE_NATS)


# --- reading late changes nothing ------------------------------------------------------------------------------------


async def thresholds(engine, mixture: Mixture, request: GenerationRequest) -> dict[str, float]:
    """Of each rule, one that some tokens of the average's own answer reach."""
    answer = await collect(OnEngine(engine, Mixture({mixture.main: 1.0})), replace(request, n=1))
    entropies = sorted(token.entropy for token in answer.choices[0].tokens)
    return {"entropy": entropies[len(entropies) // 2] + 1e-4, "disagree": 0.05}


SCHEMA = {
    "type": "array",
    "items": {"enum": ["a", "b"]},
    "minItems": 3,
    "maxItems": 6,
}
CONTROLS = {
    "top_p": {"top_p": 0.6},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "min_tokens": {"stop_token_ids": (61,), "min_tokens": 9, "logit_bias": dict.fromkeys(range(60, 64), 100.0)},
    "one token": {"max_tokens": 1},
    "grammar": {
        "grammar": Grammar("json_schema", json.dumps(SCHEMA)),
        "max_tokens": 40,
        "ignore_eos": False,
    },
}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("rule", first_fast(RULES))
async def test_every_control_acts_as_where_all_read_every_token(engine, eager, monkeypatch, rule, control):
    for name in ("some of each", "posterior"):
        request = replace(seeded(**CONTROLS[control]), n=2)
        mixture = PLAIN[name]
        when = When(**{rule: (await thresholds(engine, mixture, request))[rule]})
        model = OnEngine(engine, replace(mixture, when=when))
        ours = await collect(model, request)
        with monkeypatch.context() as patch:
            patch.setattr(choice_module, "lagging", lambda members, main: ())
            patch.setattr(choice_module.LiveChoice, "max_draft", 0)
            theirs = await collect(model, request)
        check_same_text(ours, theirs)
        for one, other in zip(ours.choices, theirs.choices, strict=True):
            assert [list(t.members) for t in one.tokens] == [list(t.members) for t in other.tokens]
            for token, same in zip(one.tokens, other.tokens, strict=True):
                weights = [view.weight for view in same.members.values()]
                assert [view.weight for view in token.members.values()] == pytest.approx(weights, abs=TOLERANCE_NATS)


async def test_a_stop_string_ends_an_answer_of_either_rule(engine, eager):
    mixture = PLAIN["weights of their own"]
    for when in (When(entropy=0.5), When(disagree=0.02)):
        model = OnEngine(engine, replace(mixture, when=when))
        whole = await collect(model, greedy(PROMPTS[2], 30))
        stop = whole.text[12:15]
        request = greedy(PROMPTS[2], 30)
        answer = await collect(model, replace(request, sampling=replace(request.sampling, stop=(stop,))))
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.choices[0].stop_reason == stop


@pytest.mark.slow
async def test_rows_with_and_without_a_rule_share_a_batch(running, eager):
    with running(max_batch=6, drafts="text") as engine:
        jobs: list[tuple[Mixture, GenerationRequest]] = []
        for seed, mixture in enumerate(PLAIN.values()):
            request = seeded(PROMPTS[seed % len(PROMPTS)], seed=seed, max_tokens=8 + 3 * seed)
            found = await thresholds(engine, mixture, request)
            for when in (None, When(entropy=found["entropy"]), When(disagree=found["disagree"])):
                jobs.append((replace(mixture, when=when), replace(request, priority=seed % 2)))
        alone = [await collect(OnEngine(engine, mixture), request) for mixture, request in jobs]
        together = await asyncio.gather(*(collect(OnEngine(engine, mixture), request) for mixture, request in jobs))
    for one, other in zip(alone, together, strict=True):
        check_same_text(one, other)


# --- what it saves ---------------------------------------------------------------------------------------------------


async def test_others_read_in_chunks_what_the_main_member_wrote_alone(running):
    steps: list[StepStats] = []
    with running(on_step=steps.append) as engine:
        mixture = Mixture({"llama": 2, "red": 1, "deep": 1, "qwen": 1}, when=When(entropy=100))
        answer = await collect(OnEngine(engine, mixture), replace(greedy(PROMPTS[0], 80), prompt_logprobs=None))
    prompt = answer.done.usage.prompt_tokens
    rows = {name: sum(step.num_rows.get(name, 0) for step in steps) for name in mixture.weights}
    tokens = {name: sum(step.num_tokens.get(name, 0) for step in steps) for name in mixture.weights}
    assert rows["llama"] - rows["deep"] == 79 - 2, "two chunks in place of every token"
    assert rows["red"] == rows["llama"], "who stands on the same weights reads in the same forward"
    assert tokens["llama"] == prompt + 79
    assert tokens["deep"] == tokens["qwen"] == prompt + 2 * MAX_LAG


async def test_by_disagreement_the_main_member_drafts_whatever_the_config_says_of_drafts(running, eager):
    steps: list[StepStats] = []
    with running(on_step=steps.append) as engine:
        mixture = Mixture({"llama": 2, "deep": 1}, when=When(disagree=1))
        answer = await collect(OnEngine(engine, mixture), replace(greedy(PROMPTS[0], 30), prompt_logprobs=None))
    assert len(answer.choices[0].token_ids) == 30
    accepted = sum(step.num_accepted.get("member", 0) for step in steps)
    assert accepted > 20
    assert sum(step.num_rows.get("deep", 0) for step in steps) < 12


def test_members_of_different_vocabularies_are_refused_by_name(mixed):
    names = tuple(mixed._members)
    apart = next(
        (one, other)
        for one in names
        for other in names
        if one != other and mixed.averages_over(Mixture({one: 1, other: 1})) == "bytes"
    )
    with pytest.raises(ModelLoadError, match="when: members of different vocabularies"):
        mixed.check(Mixture(dict.fromkeys(apart, 1.0), when=When(entropy=1)))
