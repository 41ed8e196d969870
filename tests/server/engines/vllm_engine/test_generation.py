"""One request's choices side by side: what comes, in which order, and that vLLM is let go of what nobody needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, Mixture, PromptScored, Sampling
from ensemble_server.ensembles.errors import DeadlineError
from ensemble_server.server.engines.shared.reading import Reading
from ensemble_server.server.engines.vllm_engine.generation import Prepared, generate
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer
from tests.server.engines.vllm_engine.outputs import Streams, logprob, output


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> MemberView:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return MemberView("a", Surface(AutoTokenizer.from_pretrained(folder)), frozenset({2}), 256, 320, 320)


def prepared_of(view: MemberView, *, max_new_tokens: int = 3, **changes: Any) -> Prepared:
    changes = {"prompt": (5, 6), "sampling": Sampling(**changes.pop("sampling", {}))} | changes
    reading = Reading([[5, 6]], max_new_tokens)
    return Prepared(GenerationRequest(**changes), Mixture({"a": 1.0}), [view], reading, "member")


async def events_of(prepared: Prepared, streams: Streams) -> list[Event]:
    return [event async for event in generate(prepared, streams, lambda: None)]


async def test_the_prompt_comes_first_then_deltas_then_done(view: MemberView) -> None:
    streams = Streams([output([40]), output([41]), output([42], finish_reason="length")])
    first, *deltas, done = await events_of(prepared_of(view), streams)
    assert first == PromptScored((5, 6))
    assert [delta.token_ids for delta in deltas] == [(40,), (41,), (42,)]
    assert isinstance(done, Done)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.members) == (2, 3, ("a",))
    assert streams.closed == []


async def test_choices_interleave_and_add_up(view: MemberView) -> None:
    streams = Streams(*([output([40 + index]), output([50, 51], finish_reason="length")] for index in range(3)))
    _, *deltas, done = await events_of(prepared_of(view, n=3), streams)
    for index in range(3):
        mine = [delta for delta in deltas if delta.index == index]
        assert [token for delta in mine for token in delta.token_ids] == [40 + index, 50, 51]
        assert mine[-1].finish_reason == "length"
    assert done.usage.completion_tokens == 9


@pytest.mark.parametrize("n", [1, 2])
async def test_a_choice_that_is_finished_frees_its_place_in_vllm(view: MemberView, n: int) -> None:
    endless = [output([40]) for _ in range(1000)]
    streams = Streams(*[endless] * n)
    events = await events_of(prepared_of(view, n=n, max_new_tokens=5), streams)
    assert sorted(streams.closed) == list(range(n))
    assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 5 * n


@pytest.mark.parametrize("n", [1, 2])
async def test_leaving_early_closes_every_stream(view: MemberView, n: int) -> None:
    streams = Streams(*[[output([40]) for _ in range(1000)]] * n)
    events = generate(prepared_of(view, n=n, max_new_tokens=900), streams, lambda: None)
    await anext(events)
    await anext(events)
    await events.aclose()
    assert sorted(streams.closed) == list(range(n))


async def test_scores_of_the_prompt_come_before_all_choices(view: MemberView) -> None:
    scored = [None, {6: logprob(-1.0, 1)}]
    late = [0.05, output([40], prompt_logprobs=scored, finish_reason="length")]
    early = [output([41], finish_reason="length")]
    first, *deltas, _ = await events_of(
        prepared_of(view, n=2, prompt_logprobs=1, max_new_tokens=1), Streams(late, early)
    )
    assert isinstance(first, PromptScored) and first.tokens[1].logprob == -1.0
    assert sorted(delta.index for delta in deltas) == [0, 1]


async def test_scoring_alone_asks_one_choice_and_drops_what_it_wrote(view: MemberView) -> None:
    scored = [None, {6: logprob(-1.0, 1)}]
    streams = Streams([output([40], prompt_logprobs=scored), output([41])])
    first, *deltas, done = await events_of(prepared_of(view, n=2, prompt_logprobs=0, max_new_tokens=0), streams)
    assert first.tokens[1].logprob == -1.0
    assert deltas == [Delta(0, finish_reason="length"), Delta(1, finish_reason="length")]
    assert streams.opened == [0] and done.usage.completion_tokens == 0


async def test_begun_is_told_once(view: MemberView) -> None:
    told: list[None] = []
    streams = Streams(*([output([40], finish_reason="length")] for _ in range(2)))
    async for _ in generate(prepared_of(view, n=2), streams, lambda: told.append(None)):
        pass
    assert len(told) == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_a_deadline_ends_with_what_there_is(view: MemberView, n: int) -> None:
    streams = Streams(*[[output([40]), 30.0, output([41])]] * n)
    _, *deltas, done = await events_of(prepared_of(view, n=n, deadline_s=0.2), streams)
    ends = [delta for delta in deltas if delta.finish_reason]
    assert [(delta.finish_reason, delta.stop_reason) for delta in ends] == [("length", "deadline")] * n
    assert sorted(streams.closed) == list(range(n)) and done.usage.completion_tokens == n


@pytest.mark.parametrize("n", [1, 2])
async def test_a_deadline_before_the_first_token_is_an_error(view: MemberView, n: int) -> None:
    with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
        await events_of(prepared_of(view, n=n, deadline_s=0.05), Streams(*[[30.0]] * n))


@pytest.mark.parametrize("n", [1, 3])
async def test_the_first_error_ends_all_choices(view: MemberView, n: int) -> None:
    endless = [output([40]) for _ in range(1000)]
    streams = Streams([output([40]), ValueError("lost")], *[endless] * (n - 1))
    with pytest.raises(ValueError, match="lost"):
        await events_of(prepared_of(view, n=n, max_new_tokens=900), streams)
    assert sorted(streams.closed) == list(range(n))
