"""Interactive requests beside a batch that fills the engine: who waits for whom, and that nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import pytest

from ensemble_server.ensembles.base import Delta, GenerationRequest, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import OverloadedError
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.scheduler import PATIENCE
from tests.server.engines.transformers_engine.test_numerics import OnEngine

USERS, ROWS = Mixture({"deep": 1}), Mixture({"llama": 1})  # members of their own, so that steps show who had a turn


def request(prompt: tuple[int, ...], max_tokens: int, *, priority: int, seed: int = 0) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, seed=seed)
    return GenerationRequest(prompt=prompt, sampling=sampling, priority=priority)


def row(index: int, max_tokens: int = 40, num_prompt: int = 20) -> GenerationRequest:
    return request((5 + index,) * num_prompt, max_tokens, priority=1, seed=index)


def question(num_prompt: int = 20, max_tokens: int = 3, *, first: int = 100) -> GenerationRequest:
    return request((first,) + (7,) * (num_prompt - 1), max_tokens, priority=0)


def rows_of(step: StepStats, mixture: Mixture) -> int:
    return sum(step.num_rows.get(name, 0) for name in mixture.weights)


@pytest.mark.slow
async def test_a_full_batch_makes_room_at_once_and_loses_nothing(running):
    with running(max_batch=4) as engine:
        alone = [(await collect(OnEngine(engine, ROWS), row(i))).choices[0].token_ids for i in range(6)]
    steps: list[StepStats] = []
    with running(max_batch=4, prefix_cache_bytes=0, on_step=steps.append) as engine:
        batch = [asyncio.create_task(collect(OnEngine(engine, ROWS), row(i))) for i in range(6)]
        while not any(rows_of(step, ROWS) == 4 for step in steps):
            await asyncio.sleep(0.001)
        answers = await asyncio.gather(*(collect(OnEngine(engine, USERS), question(first=i)) for i in range(3)))
        assert not any(task.done() for task in batch[4:])
        assert all(len(answer.choices[0].token_ids) == 3 for answer in answers)
        assert [(await task).choices[0].token_ids for task in batch] == alone
    assert max(sum(step.num_rows.values()) for step in steps) <= 4
    together = [step for step in steps if rows_of(step, ROWS) and rows_of(step, USERS)]
    assert together, "rows of the batch go on beside users' answers, in the places that they leave"
    read_and_written = sum(step.num_tokens.get("llama", 0) for step in steps)
    assert read_and_written == 6 * (20 + 40 - 1), "a row that paused goes on where it was"


async def test_a_batch_pauses_while_a_users_prompt_is_read(running):
    steps: list[StepStats] = []
    with running(max_batch=4, prefill_chunk=16, on_step=steps.append) as engine:
        batch = [asyncio.create_task(collect(OnEngine(engine, ROWS), row(i, 60))) for i in range(4)]
        while not any(rows_of(step, ROWS) == 4 for step in steps):
            await asyncio.sleep(0.001)
        await collect(OnEngine(engine, USERS), question(16 * 5, max_tokens=1))
        await asyncio.gather(*batch)
    reading = [step for step in steps if step.num_tokens.get("deep", 0) == 16]
    assert len(reading) == 5
    assert all(rows_of(step, ROWS) == 0 for step in reading)


@pytest.mark.slow
async def test_a_batch_goes_on_under_users_who_never_stop(running):
    """Two users hold both places and always read the next prompt; each ninth step has a row of the batch."""
    steps: list[StepStats] = []
    with running(max_batch=2, prefill_chunk=8, prefix_cache_bytes=0, on_step=steps.append) as engine:
        is_over = False

        async def user(index: int) -> None:
            while not is_over:
                await collect(OnEngine(engine, USERS), question(120, max_tokens=1, first=index))

        users = [asyncio.create_task(user(index)) for index in range(4)]
        while not steps:
            await asyncio.sleep(0.001)
        await collect(OnEngine(engine, ROWS), row(0, 10))
        is_over = True
        await asyncio.gather(*users)
    turns = [index for index, step in enumerate(steps) if rows_of(step, ROWS)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert max(gaps) <= PATIENCE + 1
    assert statistics.median(gaps) > PATIENCE / 2, "users come first"


async def test_a_queue_full_of_rows_turns_no_user_away(running):
    with running(max_batch=1, max_queue=2) as engine:
        batch = []
        for index in range(3):
            batch.append(asyncio.create_task(collect(OnEngine(engine, ROWS), row(index, 200))))
            await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError):
            await collect(OnEngine(engine, ROWS), row(9))
        assert len((await collect(OnEngine(engine, USERS), question())).choices[0].token_ids) == 3
        assert not any(task.done() for task in batch)
        for task in batch:
            task.cancel()


async def test_a_user_does_not_wait_for_a_row_that_reads_the_same_prefix(running):
    """The row pauses while the user's prompt is read, so waiting for it would be waiting for ever."""
    shared = tuple(range(10, 170))
    with running(max_batch=2, prefill_chunk=8) as engine:
        batch = asyncio.create_task(collect(OnEngine(engine, ROWS), request(shared, 5, priority=1)))
        await asyncio.sleep(0.02)
        answer = await asyncio.wait_for(collect(OnEngine(engine, ROWS), request(shared, 5, priority=0)), 20)
        assert (await batch).choices[0].token_ids == answer.choices[0].token_ids


async def first_token_s(engine, index: int) -> float:
    started = time.perf_counter()
    first = None
    async for event in OnEngine(engine, USERS).generate(question(60, max_tokens=2, first=index)):
        if isinstance(event, Delta) and first is None:
            first = time.perf_counter() - started
    return first


async def test_under_a_full_batch_the_first_token_comes_within_twice_the_idle_time(running, monkeypatch):
    """On a machine whose forwards cost 2 ms and 0.5 ms per token: reading the user's prompt takes 32 ms, a step of the
    batch that nobody bounds 130 ms and more."""
    forward = Backbone.forward

    def slow(self, spans):
        time.sleep(0.002 + 0.0005 * sum(len(span.token_ids) for span in spans))
        return forward(self, spans)

    monkeypatch.setattr(Backbone, "forward", slow)
    with running(max_batch=8, prefill_chunk=256, prefix_cache_bytes=0) as engine:
        idle = [await first_token_s(engine, index) for index in range(5)]
        batch = [asyncio.create_task(collect(OnEngine(engine, ROWS), row(i, 4, 200))) for i in range(60)]
        await asyncio.sleep(0.5)
        busy = []
        for index in range(15):
            busy.append(await first_token_s(engine, 20 + index))
            await asyncio.sleep(0.02 + 0.007 * (index % 5))
        assert sum(not task.done() for task in batch) >= 8, "the batch must still fill the engine"
        for task in batch:
            task.cancel()
    assert statistics.median(busy) < 2 * statistics.median(idle)
