"""The scripted model keeps the contract of `ensembles.base.Model`, and misbehaves exactly where it is told to."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from ensemble_server.ensembles.base import Delta, Done, GenerationRequest, Model, PromptScored, Sampling, collect
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.scripted_engine import LOGPROB, Script, ScriptedModel
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer

MESSAGES = ({"role": "user", "content": "hi"},)


def ask(**changes):
    return GenerationRequest(messages=MESSAGES, **changes)


async def events(model, request):
    return [event async for event in model.generate(request)]


def test_it_is_a_model():
    assert isinstance(ScriptedModel("m", Script()), Model)


async def test_it_says_its_script_and_ends_with_done():
    *deltas, done = await events(ScriptedModel("m", Script(("a", "b"))), ask())
    assert deltas == [Delta(0, "a", (0,)), Delta(0, "b", (1,), finish_reason="stop")]
    assert done == Done(done.usage, method="scripted", members=("m",), turnout=1)
    assert (done.usage.completion_tokens, done.usage.members["m"].completion_tokens) == (2, 2)


async def test_max_tokens_cuts_the_script():
    answer = await collect(ScriptedModel("m", Script(("a", "b", "c"))), ask(sampling=Sampling(max_tokens=2)))
    assert (answer.text, answer.choices[0].finish_reason) == ("ab", "length")


@pytest.mark.parametrize("max_tokens", [None, 5])
async def test_an_empty_script_is_an_empty_answer(max_tokens):
    answer = await collect(ScriptedModel("m", Script()), ask(sampling=Sampling(max_tokens=max_tokens)))
    assert (answer.text, answer.choices[0].finish_reason) == ("", "stop")


async def test_no_tokens_at_all_finish_with_length():
    answer = await collect(ScriptedModel("m", Script(("a",))), ask(sampling=Sampling(max_tokens=0)))
    assert (answer.text, answer.choices[0].finish_reason, answer.done.usage.completion_tokens) == ("", "length", 0)


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_it_dies_at_the_token_it_is_told_to(place):
    model, seen = ScriptedModel("m", Script(("a", "b"), fails_at=place)), []
    with pytest.raises(MemberError, match=f"member 'm': scripted to fail at token {place}"):
        async for event in model.generate(ask()):
            seen.append(event)
    assert [event.text for event in seen] == ["a", "b"][:place]
    assert not any(event.finish_reason for event in seen)
    assert model.num_live == 0


async def test_it_dies_of_the_error_it_is_given():
    with pytest.raises(ZeroDivisionError):
        await collect(ScriptedModel("m", Script(fails_at=0, error=ZeroDivisionError())), ask())


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_it_stalls_until_its_reader_leaves(place):
    model = ScriptedModel("m", Script(("a", "b"), stalls_at=place))
    async with aclosing(model.generate(ask())) as generation:
        for _ in range(place):
            await anext(generation)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(generation)
    assert model.num_live == 0


async def test_closing_it_frees_it():
    model = ScriptedModel("m", Script(("a", "b")))
    generation = model.generate(ask())
    await anext(generation)
    assert model.num_live == 1
    await generation.aclose()
    assert model.num_live == 0


async def test_choices_come_in_the_order_of_their_delays():
    model = ScriptedModel("m", lambda request, index: Script((f"c{index}",), start_delay_s=0.02 * (2 - index)))
    *deltas, _ = await events(model, ask(n=3))
    assert [delta.index for delta in deltas] == [2, 1, 0]


async def test_it_takes_the_time_it_is_told_to():
    started = time.perf_counter()
    await collect(ScriptedModel("m", Script(("a", "b"), delay_s=0.03, start_delay_s=0.04)), ask())
    assert time.perf_counter() - started >= 0.1


async def test_it_remembers_what_it_was_asked():
    model, request = ScriptedModel("m", Script()), ask()
    await collect(model, request)
    assert model.requests == [request]


async def test_with_a_tokenizer_it_reads_and_scores_prompts(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path)
    surface = Surface(AutoTokenizer.from_pretrained(tmp_path))
    model = ScriptedModel("m", Script(("The",)), surface=surface)
    request = GenerationRequest(prompt="The fox", top_logprobs=2, prompt_logprobs=1, explain=True)
    prompt, delta, done = await events(model, request)
    assert isinstance(prompt, PromptScored)
    assert list(prompt.token_ids) == surface.encode("The fox")
    assert [token.logprob for token in prompt.tokens] == [None] + [LOGPROB] * (len(prompt.token_ids) - 1)
    assert delta.token_ids == (surface.encode("The")[0],)
    assert [alternative.logprob for alternative in delta.tokens[0].top] == [LOGPROB, 2 * LOGPROB]
    assert delta.tokens[0].members["m"].weight == 1
    assert done.usage.prompt_tokens == len(prompt.token_ids)
