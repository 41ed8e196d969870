"""Caches together stay below a bound: the order in which jobs may grow, and an engine that is filled to it."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ensemble_server.ensembles.base import Answer, GenerationRequest, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import ContextLengthError, ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine import byte_generation
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.kv_budget import KvBudget, Spare, default_bytes
from ensemble_server.server.engines.transformers_engine.kv_cache import GROWTH, RowCache, Segment
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.weights.devices import free_bytes
from ensemble_server.server.weights.member_views import read_member_files
from tests.conftest import make_model
from tests.server.engines.transformers_engine import vocabularies
from tests.server.engines.transformers_engine.families import Families, asked
from tests.server.engines.transformers_engine.test_numerics import OnEngine
from tests.thinned import first_fast

LLAMA, MIX = Mixture({"llama": 1}), Mixture({"llama": 1, "red": 1})
TOKEN = 2 * 2 * 2 * 8 * 4  # bytes of one token of the tiny llama: layers, keys and values, heads, dim, float32
BLOCK = GROWTH * TOKEN


@dataclass(eq=False)
class Claim:
    """A job as far as memory is concerned."""

    kv_reserved: int = 0
    kv_left: int = 0
    priority: int = 0
    segments: Sequence[Segment] = ()
    has_begun: bool = True
    is_finished: bool = False
    members: Sequence[Any] = field(default_factory=list)

    @property
    def caches(self):
        return iter([RowCache(tuple(self.segments))])


def budget(max_bytes: int, *jobs: Claim) -> Any:
    made: Any = KvBudget(max_bytes)
    made.open(jobs)
    return made


# --- the rule ---


def test_a_job_grows_only_as_long_as_all_can_end_one_after_the_other() -> None:
    first, second = Claim(40, 40), Claim(40, 40)
    kv = budget(120, first, second)
    assert kv.grants(first, 10)  # 50 + 30 to come, 30 are free: it can end, and then the other
    assert not kv.grants(second, 10)  # 20 free, and both want 30
    assert kv.grants(first, 20)
    assert kv.grants(first, 10)
    assert not kv.grants(second, 10)
    kv.open([second])
    assert kv.grants(second, 40)


def test_a_job_is_admitted_if_its_prompt_leaves_an_order_in_which_all_end() -> None:
    running = Claim(60, 20)
    kv = budget(100, running)
    assert not kv.admits(Claim(30, 15, has_begun=False))  # 10 would be free, and neither could end with that
    assert kv.admits(Claim(30, 10, has_begun=False))  # the newcomer ends with that, then the other has enough
    assert not kv.admits(Claim(5, 6, has_begun=False))


def test_what_jobs_share_is_free_when_the_last_of_them_ends() -> None:
    layers = {0: (torch.zeros(1, 10, 1), torch.zeros(1, 10, 1))}
    segment = Segment(10, layers)
    assert segment.num_bytes == 80
    sharing = [Claim(0, 10, segments=[segment]), Claim(0, 10, segments=[segment])]
    assert budget(100, *sharing).admits(Claim(0, 100, has_begun=False))
    assert not budget(90, *sharing).promises(sharing[0], 1)


def test_background_jobs_leave_a_quarter_to_interactive_ones_unless_they_are_alone() -> None:
    row = Claim(60, 40, priority=1)
    kv = budget(100)
    assert kv.admits(row)
    assert not kv.admits(Claim(10, 0, priority=1, has_begun=False))
    assert kv.grants(row, 40)
    kv = budget(100, Claim(60, 0, priority=1))
    assert not kv.admits(Claim(20, 0, priority=1, has_begun=False))
    assert kv.admits(Claim(20, 0, has_begun=False))


def test_the_default_follows_the_free_memory() -> None:
    free = free_bytes("cpu")
    assert 0.5 * free < default_bytes(["cpu"], 0) < free
    assert default_bytes(["cpu"], 2**60) == 0


# --- an engine ---


def request(index: int, *, num_prompt: int = 20, max_tokens: int = 200, n: int = 1, **fields: Any) -> GenerationRequest:
    prompt = tuple(5 + (index * 31 + place * 7) % 290 for place in range(num_prompt))
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(prompt=prompt, sampling=sampling, n=n, **fields)


async def texts(engine: TransformersEngine, mixture: Mixture, requests: Sequence[GenerationRequest]) -> list[list[str]]:
    answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), one) for one in requests))
    return [[choice.text for choice in answer.choices] for answer in answers]


@pytest.mark.parametrize(
    ("mixture", "n", "prefix_cache_bytes"), first_fast([(LLAMA, 1, 0), (MIX, 1, 2**20), (LLAMA, 3, 0)]), ids=str
)
async def test_a_full_engine_stays_below_the_bound_and_answers_as_without_one(running, mixture, n, prefix_cache_bytes):
    requests = [request(index, n=n) for index in range(8)]
    with running(prefix_cache_bytes=0) as engine:
        expected = await texts(engine, mixture, requests)
    steps: list[StepStats] = []
    bound = 12 * BLOCK * len(mixture.weights)
    with running(kv_cache_bytes=bound, prefix_cache_bytes=prefix_cache_bytes, on_step=steps.append) as engine:
        assert await texts(engine, mixture, requests) == expected
    held = [step.kv_cache_bytes for step in steps]
    assert 0.5 * bound < max(held) <= bound
    assert max(step.num_running for step in steps) >= 3, "answers share what the longest of them could take alone"
    assert max(step.num_waiting for step in steps) > 0 or n > 1


@pytest.mark.slow
async def test_interactive_requests_do_not_wait_for_the_memory_of_a_batch(running):
    bound, ended = 16 * BLOCK, []

    async def ask(engine, name: str, one: GenerationRequest) -> None:
        await collect(OnEngine(engine, LLAMA), one)
        ended.append(name)

    steps: list[StepStats] = []
    with running(kv_cache_bytes=bound, prefix_cache_bytes=0, on_step=steps.append) as engine:
        rows = [asyncio.create_task(ask(engine, "row", request(index, priority=1))) for index in range(8)]
        while not any(step.num_waiting for step in steps):
            await asyncio.sleep(0.001)
        await ask(engine, "user", request(9, max_tokens=20))
        assert ended[0] == "user"
        await asyncio.gather(*rows)
    assert max(step.kv_cache_bytes for step in steps) <= bound


async def test_what_never_fits_is_refused_at_once_and_answers_end_where_memory_does(running):
    with running(kv_cache_bytes=9 * BLOCK // 2, prefix_cache_bytes=0, only=("llama", "red")) as engine:
        with pytest.raises(ContextLengthError, match=r"0\.2 MB; engine\.kv_cache_mb is 0\.1 MB; shorten it"):
            await collect(OnEngine(engine, LLAMA), request(0, num_prompt=200, max_tokens=2))
        with pytest.raises(ContextLengthError, match="as llama, red would keep them"):
            await engine.visit_logprobs(["llama", "red"], [7] * 250, lambda logprobs, targets: None)
        answer = await collect(OnEngine(engine, LLAMA), request(0, num_prompt=100, max_tokens=150))
        assert answer.choices[0].finish_reason == "length"
        assert 1 <= len(answer.choices[0].token_ids) < 150
        await engine.visit_logprobs(["llama"], [7] * 250, lambda logprobs, targets: None)


def test_a_bound_below_the_shortest_request_is_refused_by_name(running):
    refusal = pytest.raises(ModelLoadError, match=r"member 'llama' needs 0\.1 MB .*engine\.kv_cache_mb is 0\.1 MB")
    with refusal, running(kv_cache_bytes=2 * BLOCK):
        pass


async def test_members_of_different_vocabularies_answer_within_the_bound(families: Families) -> None:
    mixture, steps = Mixture({"llama": 1, "qwen": 1}, vocabulary="bytes"), []
    requests = [
        GenerationRequest(prompt=f"Once {index} upon", sampling=Sampling(temperature=0, max_tokens=12, ignore_eos=True))
        for index in range(4)
    ]
    with families.running(prefix_cache_bytes=0) as engine:
        expected = await texts(engine, mixture, requests)
    with families.running(kv_cache_bytes=14 * BLOCK, prefix_cache_bytes=0, on_step=steps.append) as engine:
        assert await texts(engine, mixture, requests) == expected
    assert max(step.kv_cache_bytes for step in steps) <= 14 * BLOCK


def long_prompt(index: int, **options: Any) -> GenerationRequest:
    """So long that a copy of a row, which alternatives want, takes most of a block."""
    return asked(f"Once {index} upon " + "a quick fox jumps. " * 8, ignore_eos=True, **options)


@pytest.mark.slow
async def test_branches_of_lattices_take_what_nobody_else_needs(families: Families, monkeypatch) -> None:
    """Where they are not counted they take more; the answers, with their alternatives, are the same."""
    mixture = Mixture({"llama": 1, "qwen": 1}, vocabulary="bytes")
    requests = [long_prompt(i, top_logprobs=8, temperature=1, seed=i, max_tokens=5) for i in range(3)]
    bound = 10 * BLOCK

    async def answers() -> tuple[list[Answer], int]:
        steps: list[StepStats] = []
        with families.running(prefix_cache_bytes=0, kv_cache_bytes=bound, on_step=steps.append) as engine:
            found = await asyncio.gather(*(collect(OnEngine(engine, mixture), one) for one in requests))
        return list(found), max(step.kv_cache_bytes for step in steps)

    found, held = await answers()
    monkeypatch.setattr(Spare, "lends", lambda self, num_bytes: True)
    expected, uncounted = await answers()
    assert held <= bound < uncounted
    for ours, theirs in zip(found, expected, strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize("options", [{"top_logprobs": 3}, {"prompt_logprobs": 0}, {"prompt_logprobs": 2}], ids=str)
async def test_without_memory_for_branches_a_member_rewinds_its_row_for_each(mixed, monkeypatch, options) -> None:
    mixture, one = (
        Mixture({"llama": 1, "gemma": 1}),
        asked("The quick 😀 brown fo", max_tokens=6, explain=True, **options),
    )
    expected = await collect(OnEngine(mixed, mixture), one)
    monkeypatch.setattr(Spare, "lends", lambda self, num_bytes: False)
    found = await collect(OnEngine(mixed, mixture), one)
    assert_alike(found, expected)
    if found.prompt and expected.prompt:
        ours, theirs = ([token.logprob for token in one.tokens[1:]] for one in (found.prompt, expected.prompt))
        assert ours == pytest.approx(theirs, abs=1e-3)
        listed, others = ([top for token in one.tokens for top in token.top] for one in (found.prompt, expected.prompt))
        assert [top.bytes for top in listed] == [top.bytes for top in others]
        assert [top.logprob for top in listed] == pytest.approx([top.logprob for top in others], abs=1e-3)


def assert_alike(found: Answer, expected: Answer) -> None:
    ours, theirs = found.choices[0], expected.choices[0]
    assert ours.token_ids == theirs.token_ids
    for token, other in zip(ours.tokens, theirs.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [one.bytes for one in token.top] == [one.bytes for one in other.top]
        assert [one.logprob for one in token.top] == pytest.approx([one.logprob for one in other.top], abs=1e-3)


async def test_a_lattice_that_reads_more_than_it_claimed_ends_where_memory_does(
    families: Families, monkeypatch
) -> None:
    """Claims are estimates. Here they are nothing, so that two come to hold all and both want more."""
    monkeypatch.setattr(byte_generation, "READ_PER_PIECE", 0)
    monkeypatch.setattr(byte_generation, "answer_bytes", lambda members, num_tokens: 0)
    mixture, steps = Mixture({"llama": 1, "twin": 1}, vocabulary="bytes"), []
    prompts = [tuple(5 + (index + place) % 60 for place in range(220)) for index in range(2)]
    bound = 8 * BLOCK
    with families.running(kv_cache_bytes=bound, prefix_cache_bytes=0, on_step=steps.append) as engine:
        sampling = Sampling(temperature=0, max_tokens=30, ignore_eos=True)
        requests = [GenerationRequest(prompt=prompt, sampling=sampling) for prompt in prompts]
        answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), one) for one in requests))
    assert [answer.choices[0].finish_reason for answer in answers] == ["length", "length"]
    lengths = [len(answer.choices[0].token_ids) for answer in answers]
    assert 1 <= min(lengths) < 30
    assert max(step.kv_cache_bytes for step in steps) <= bound


@pytest.mark.slow
async def test_branching_lattices_make_the_process_grow_by_no_more_than_the_bound(tmp_path: Path, monkeypatch) -> None:
    """With heads so wide that caches are all that counts: 64 kB per token and member, 8 MB per block. Alternatives and
    scored prompts want rows on copies of what was read. A quarter is the margin, for activations."""
    wide: dict[str, Any] = {"head_dim": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    models = {name: make_model(tmp_path / name, "qwen3", seed=seed, **wide) for seed, name in enumerate(("one", "two"))}
    vocabularies.byte_level(models["two"])
    blocks = {name: HostedModel(path=str(folder)) for name, folder in models.items()}
    members = load_members(blocks, read_member_files(blocks, relative_to=Path(), max_context=256))
    of_block = sum(GROWTH * member.backbone.kv_bytes_per_token for member in members.values())
    assert of_block == 16 * 2**20
    mixture, bound = Mixture({"one": 1, "two": 1}), 10 * of_block
    process, steps, grown, refused = psutil.Process(), [], [], []
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what is freed stays with the process else
    lends = Spare.lends

    def asked_for(spare: Spare, num_bytes: int) -> bool:
        is_lent = lends(spare, num_bytes)
        refused.append(not is_lent)
        return is_lent

    def observe(step: StepStats) -> None:
        steps.append(step)
        if give_back is not None:
            give_back(0)
        grown.append(process.memory_info().rss - before)

    monkeypatch.setattr(Spare, "lends", asked_for)
    requests = [long_prompt(i, top_logprobs=8, temperature=1, seed=i, max_tokens=5) for i in range(5)]
    requests += [long_prompt(i, prompt_logprobs=0, max_tokens=0) for i in range(5, 8)]
    engine = TransformersEngine(members, kv_cache_bytes=bound, prefix_cache_bytes=0, on_step=observe)
    engine.start()
    before = 2**62
    try:
        await collect(OnEngine(engine, mixture), asked(max_tokens=3, top_logprobs=2))  # weights are read
        before = process.memory_info().rss
        grown.clear()
        await asyncio.gather(*(collect(OnEngine(engine, mixture), one) for one in requests))
    finally:
        engine.stop()
    held = max(step.kv_cache_bytes for step in steps)
    assert 0.5 * bound < held <= bound
    assert any(refused) and not all(refused), "some branches have memory, some have none"
    assert max(grown) <= 1.25 * bound


@pytest.mark.slow
async def test_the_process_grows_by_no_more_than_the_bound(tmp_path: Path) -> None:
    """With heads so wide that caches are all that counts: 128 kB per token, 16 MB per block."""
    wide: dict[str, Any] = {"head_dim": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 4}
    models = {"wide": HostedModel(path=str(make_model(tmp_path, "qwen3", seed=3, **wide)))}
    members = load_members(models, read_member_files(models, relative_to=Path(), max_context=256))
    process, grown, bound = psutil.Process(), [], 128 * 2**20
    assert members["wide"].backbone.kv_bytes_per_token == 131072

    def observe(step: StepStats) -> None:
        grown.append(process.memory_info().rss - before)
        assert step.kv_cache_bytes <= bound

    engine = TransformersEngine(members, kv_cache_bytes=bound, prefix_cache_bytes=0, on_step=observe)
    engine.start()
    before = 2**62
    try:
        await texts(engine, Mixture({"wide": 1}), [request(9)])  # kernels are compiled, weights read
        before = process.memory_info().rss
        grown.clear()
        await texts(engine, Mixture({"wide": 1}), [request(index, max_tokens=120) for index in range(8)])
    finally:
        engine.stop()
    assert max(grown) <= 1.25 * bound
