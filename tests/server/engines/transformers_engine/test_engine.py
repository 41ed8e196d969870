"""How requests live in the engine: seeds, choices, stops, queue, cancellation, deadlines, failures."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import pytest
import torch

from ensemble_server.ensembles.base import Done, GenerationRequest, Grammar, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    DeadlineError,
    EngineDeadError,
    MemberError,
    OverloadedError,
    RequestError,
    UnsupportedError,
)
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from tests.server.engines.transformers_engine.test_numerics import OnEngine

MIX = Mixture({"llama": 1, "deep": 1, "red": 1})


def ask(prompt: str | tuple[int, ...] = "To be, or not", *, n: int = 1, **sampling: object) -> GenerationRequest:
    settings = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True} | sampling
    return GenerationRequest(prompt=prompt, n=n, sampling=Sampling(**settings))


async def text_of(engine, mixture: Mixture, request: GenerationRequest) -> list[str]:
    return [choice.text for choice in (await collect(OnEngine(engine, mixture), request)).choices]


async def test_a_seed_repeats_alone_and_in_company(engine):
    alone = await text_of(engine, MIX, ask(seed=7))
    others = [text_of(engine, MIX, ask("def f(x):", seed=seed)) for seed in range(5)]
    in_company, *rest = await asyncio.gather(text_of(engine, MIX, ask(seed=7)), *others)
    assert in_company == alone
    assert len({text for texts in rest for text in texts}) == 5


async def test_choices_of_one_seed_differ_and_repeat(engine):
    first = await text_of(engine, MIX, ask(n=4, seed=3))
    assert len(set(first)) == 4
    assert await text_of(engine, MIX, ask(n=4, seed=3)) == first
    assert (await text_of(engine, MIX, ask(n=1, seed=3)))[0] == first[0]


async def test_without_a_seed_answers_vary(engine):
    texts = await asyncio.gather(*(text_of(engine, MIX, ask()) for _ in range(4)))
    assert len({text for (text,) in texts}) > 1


async def test_greedy_choices_are_equal(engine):
    texts = await text_of(engine, MIX, ask(n=3, temperature=0))
    assert len(set(texts)) == 1


async def test_more_choices_than_places_share_one_prefill(running):
    steps: list[StepStats] = []
    with running(max_batch=2, on_step=steps.append) as engine:
        answer = await collect(OnEngine(engine, MIX), ask(n=5, seed=1, max_tokens=4))
    assert all(len(choice.token_ids) == 4 for choice in answer.choices)
    forwarded = {name: sum(step.num_tokens.get(name, 0) for step in steps) for name in MIX.weights}
    prompt = answer.done.usage.prompt_tokens
    assert forwarded == dict.fromkeys(MIX.weights, prompt + 5 * 3)  # the last token of a choice is never forwarded
    assert max(sum(step.num_rows.values()) for step in steps) <= 2 * len(MIX.weights)
    assert answer.done.usage.completion_tokens == 20


async def test_a_member_of_weight_zero_is_not_run(running):
    from ensemble_server.ensembles.probability_averaging import mixture_of

    steps: list[StepStats] = []
    with running(on_step=steps.append) as engine:
        mixture = mixture_of({"llama": 1, "deep": 0, "red": 1}, "arithmetic", 0.0)
        await collect(OnEngine(engine, mixture), ask())
    assert all("deep" not in step.num_tokens for step in steps)


async def test_streamed_text_is_the_tokens_text(engine, members):
    answer = await collect(OnEngine(engine, MIX), ask(max_tokens=60, seed=11, skip_special_tokens=False))
    choice = answer.choices[0]
    assert choice.text == members["llama"].surface.decode(choice.token_ids)
    assert choice.text.encode(errors="replace") and len(choice.token_ids) == 60
    assert choice.finish_reason == "length"


async def test_a_stop_string_ends_the_text_before_it_also_across_tokens(engine):
    (whole,) = await text_of(engine, MIX, ask(max_tokens=40, seed=5))
    stop = whole[9:13]
    answer = await collect(OnEngine(engine, MIX), ask(max_tokens=40, seed=5, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)
    included = await text_of(engine, MIX, ask(max_tokens=40, seed=5, stop=(stop,), include_stop_str_in_output=True))
    assert included == [whole[: whole.index(stop) + len(stop)]]


async def test_stop_token_ids_end_a_choice_and_min_tokens_holds_them_off(engine):
    plain = await collect(OnEngine(engine, MIX), ask(temperature=0))
    first = plain.choices[0].token_ids[0]
    stopped = await collect(OnEngine(engine, MIX), ask(temperature=0, stop_token_ids=(first,)))
    assert stopped.choices[0].token_ids == []
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", first)
    held = await collect(OnEngine(engine, MIX), ask(temperature=0, stop_token_ids=(first,), min_tokens=3))
    assert len(held.choices[0].token_ids) >= 3 and first not in held.choices[0].token_ids[:3]


async def test_end_of_text_of_any_member_ends_the_answer(engine, members):
    eos = min(members["gemma"].eos_ids | members["llama"].eos_ids)
    push = {eos: 100.0}
    answer = await collect(OnEngine(engine, MIX), ask(logit_bias=push, ignore_eos=False))
    assert (answer.text, answer.choices[0].finish_reason) == ("", "stop")
    ignoring = await collect(OnEngine(engine, MIX), ask(logit_bias=push, max_tokens=5))
    assert ignoring.choices[0].token_ids == [eos] * 5


async def test_penalties_and_bias_act_on_the_mixture(engine):
    repeated = await collect(OnEngine(engine, MIX), ask(temperature=0, max_tokens=30))
    penalised = await collect(OnEngine(engine, MIX), ask(temperature=0, max_tokens=30, presence_penalty=100.0))
    assert len(set(repeated.choices[0].token_ids)) < 30
    assert len(set(penalised.choices[0].token_ids)) == 30
    biased = await collect(OnEngine(engine, MIX), ask(temperature=0, max_tokens=4, logit_bias={40: 100.0}))
    assert biased.choices[0].token_ids == [40] * 4


@pytest.mark.parametrize("seed", range(3))
async def test_structured_output_holds_for_a_mixture(engine, seed):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    grammar = Grammar("json_schema", json.dumps(schema))
    (text,) = await text_of(engine, MIX, ask(grammar=grammar, max_tokens=200, seed=seed, ignore_eos=False))
    assert set(json.loads(text)) == {"ok", "kind"}
    (date,) = await text_of(
        engine, MIX, ask(grammar=Grammar("regex", r"\d{4}-\d{2}"), max_tokens=50, seed=seed, ignore_eos=False)
    )
    assert re.fullmatch(r"\d{4}-\d{2}", date)


async def test_bad_requests_are_refused_by_name(engine):
    async def refused(error: type[Exception], request: GenerationRequest, message: str) -> None:
        with pytest.raises(error, match=message):
            await collect(OnEngine(engine, MIX), request)

    await refused(ContextLengthError, ask("word " * 400), "the prompt has .* tokens; this model's context holds 256")
    await refused(RequestError, ask((1, 999)), "token id 999 is outside the vocabulary of 320")
    await refused(RequestError, ask(""), "no tokens")
    await refused(RequestError, ask(logit_bias={320: 1.0}), "token id 320")
    await refused(RequestError, ask(grammar=Grammar("regex", "(")), "regex is not valid")
    views = Mixture({"llama": 1, "polite": 1})
    request = GenerationRequest(messages=({"role": "user", "content": "x"},), prompt_logprobs=0)
    with pytest.raises(UnsupportedError, match="different views"):
        await collect(OnEngine(engine, views), request)


async def test_the_answer_is_clamped_to_the_context(engine):
    answer = await collect(OnEngine(engine, MIX), ask((5,) * 250, max_tokens=100))
    assert len(answer.choices[0].token_ids) == 6
    assert answer.choices[0].finish_reason == "length"


async def test_scoring_alone_generates_nothing(engine):
    request = GenerationRequest(prompt=(5, 6, 7), sampling=Sampling(max_tokens=0), prompt_logprobs=1)
    answer = await collect(OnEngine(engine, MIX), request)
    assert [token.token_id for token in answer.prompt.tokens] == [5, 6, 7]
    assert answer.choices[0].token_ids == [] and answer.choices[0].finish_reason == "length"


def test_an_idle_engine_goes_on_making_its_steps_faster(running, monkeypatch):
    is_done = threading.Event()

    def halving(self):
        yield
        yield
        is_done.set()

    monkeypatch.setattr(Backbone, "halving", halving)
    with running():
        assert is_done.wait(30)


async def test_a_full_queue_refuses_and_recovers(running):
    with running(max_batch=1, max_queue=2) as engine:
        model = OnEngine(engine, MIX)
        streams = []
        for _ in range(3):
            stream = model.generate(ask(max_tokens=200))
            if not streams:
                await anext(stream)  # the first is admitted, the others wait behind it
                streams.append(stream)
            else:
                streams.append(asyncio.create_task(collect(model, ask(max_tokens=2))))
                await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError, match="queue is full"):
            await collect(model, ask())
        await streams[0].aclose()
        assert all([(await task).choices[0].finish_reason == "length" for task in streams[1:]])
        await collect(model, ask())


async def test_hanging_up_frees_the_rows_within_a_step(running):
    steps: list[StepStats] = []
    with running(on_step=steps.append) as engine:
        stream = OnEngine(engine, MIX).generate(ask(max_tokens=220))
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        num_steps = len(steps)
        await asyncio.sleep(0.2)
        assert len(steps) <= num_steps + 2
        await collect(OnEngine(engine, MIX), ask(max_tokens=2))
        assert steps[-1].num_running == 0


async def test_urgent_requests_overtake_waiting_ones(running):
    finished: list[int] = []
    with running(max_batch=1) as engine:
        model = OnEngine(engine, MIX)

        async def run(priority: int) -> None:
            sampling = Sampling(max_tokens=20, ignore_eos=True)
            await collect(model, GenerationRequest(prompt="x", sampling=sampling, priority=priority))
            finished.append(priority)

        tasks = []
        for priority in (5, 9, 3, 1):
            tasks.append(asyncio.create_task(run(priority)))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
    assert finished == [5, 1, 3, 9]


async def test_a_deadline_ends_with_what_there_is_or_an_error(running, monkeypatch):
    with running(max_batch=1) as engine:
        sampling = Sampling(max_tokens=10_000, ignore_eos=True)
        forward = Backbone.forward
        monkeypatch.setattr(Backbone, "forward", lambda self, spans: time.sleep(0.01) or forward(self, spans))
        request = GenerationRequest(prompt="x", sampling=sampling, deadline_s=0.5)
        running_task = asyncio.create_task(collect(OnEngine(engine, MIX), request))
        await asyncio.sleep(0.1)
        hopeless = GenerationRequest(prompt="x", sampling=sampling, deadline_s=0.05)
        with pytest.raises(DeadlineError, match=r"no token was generated within 0\.05 s"):
            await collect(OnEngine(engine, MIX), hopeless)
        answer = await running_task
    assert answer.choices[0].stop_reason == "deadline"
    assert 0 < len(answer.choices[0].token_ids) < 200
    assert isinstance(answer.done, Done)


async def test_a_member_that_gives_nan_fails_its_requests_alone(running, monkeypatch):
    forward = Backbone.forward

    def poisoned(self, spans):
        rows = forward(self, spans)
        return [torch.full_like(row, torch.nan) for row in rows] if self is sick else rows

    with running() as engine:
        sick = engine._members["deep"].backbone
        monkeypatch.setattr(Backbone, "forward", poisoned)
        healthy = asyncio.create_task(collect(OnEngine(engine, Mixture({"llama": 1})), ask(max_tokens=30)))
        with pytest.raises(MemberError, match=r"member 'deep': .*NaN"):
            await collect(OnEngine(engine, MIX), ask())
        assert len((await healthy).choices[0].token_ids) == 30


async def test_a_failed_forward_fails_its_requests_and_the_engine_goes_on(running, monkeypatch):
    forward, failures = Backbone.forward, [RuntimeError("out of memory")]

    def flaky(self, spans):
        if failures:
            raise failures.pop()
        return forward(self, spans)

    with running() as engine:
        monkeypatch.setattr(Backbone, "forward", flaky)
        with pytest.raises(MemberError, match="out of memory"):
            await collect(OnEngine(engine, MIX), ask())
        assert await text_of(engine, MIX, ask(seed=1))
        assert engine.failure is None and not engine.down


async def test_an_engine_whose_forwards_all_fail_dies_and_says_so(running, members, monkeypatch):
    def broken(self, spans):
        raise RuntimeError("the device is gone")

    with running() as engine:
        monkeypatch.setattr(Backbone, "forward", broken)
        errors = [
            (await asyncio.gather(collect(OnEngine(engine, MIX), ask()), return_exceptions=True))[0] for _ in range(4)
        ]
    assert [type(error) for error in errors] == [MemberError, MemberError, EngineDeadError, EngineDeadError]
    assert "the device is gone" in engine.failure
    assert engine.down == set(members)


async def test_stopping_ends_live_generations_with_an_error(running):
    with running() as engine:
        task = asyncio.create_task(collect(OnEngine(engine, MIX), ask(max_tokens=240)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineDeadError, match="stopped"):
            await task
        with pytest.raises(EngineDeadError):
            await collect(OnEngine(engine, MIX), ask())


async def test_a_long_prompt_does_not_stall_a_live_stream(running):
    """While 240 prompt tokens are read in chunks, the live stream gets a token at every step."""
    steps: list[StepStats] = []
    with running(prefill_chunk=24, on_step=steps.append) as engine:
        model = OnEngine(engine, Mixture({"llama": 1}))
        live = model.generate(ask("x", max_tokens=200))
        await anext(live)
        await anext(live)
        await collect(model, ask((5,) * 240, max_tokens=1))
        await live.aclose()
    prefilling = [step for step in steps if step.num_tokens["llama"] > 20 and step.num_rows["llama"] == 2]
    assert len(prefilling) >= 9
    assert max(step.num_tokens["llama"] for step in steps) <= 25


async def test_members_on_different_devices_run_at_the_same_time(members, monkeypatch):
    """There is one device here, so two are pretended: each forward waits at a barrier that only both together pass."""
    place = {id(members["llama"].backbone): "one", id(members["deep"].backbone): "two"}
    meeting = threading.Barrier(2, timeout=10)

    def forward(self, spans):
        meeting.wait()
        for span in spans:
            span.cache.commit(len(span.token_ids))
        return [torch.full((span.num_keep, self.vocab_size), 1 / self.vocab_size).log() for span in spans]

    monkeypatch.setattr(Backbone, "device", property(lambda self: place[id(self)]))
    monkeypatch.setattr(Backbone, "forward", forward)
    engine = TransformersEngine({name: members[name] for name in ("llama", "deep")})
    engine.start()
    try:
        answer = await collect(OnEngine(engine, Mixture({"llama": 1, "deep": 1})), ask(max_tokens=3))
    finally:
        engine.stop()
    assert len(answer.choices[0].token_ids) == 3
