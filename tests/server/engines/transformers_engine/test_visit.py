"""Texts that members read to be judged: every distribution against the float32 reference, and life in the engine."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Mixture, collect
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    EngineDeadError,
    MemberError,
    ModelLoadError,
    RequestError,
)
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from tests.server.engines.transformers_engine.test_engine import ask
from tests.server.engines.transformers_engine.test_numerics import TOLERANCE_NATS, OnEngine

TEXT = tuple(np.random.default_rng(0).integers(3, 320, 150).tolist())
FAMILIES = ("llama", "red", "gemma", "gpt2")


class Seen:
    """A visitor that keeps what it was shown."""

    def __init__(self) -> None:
        self.logprobs: list[torch.Tensor] = []
        self.targets: list[int] = []

    def __call__(self, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        assert logprobs.dtype == torch.float32 and targets.dtype == torch.int64
        assert logprobs.shape[1] == len(targets)
        self.logprobs.append(logprobs.clone())
        self.targets += targets.tolist()


@pytest.mark.parametrize("prefill_chunk", [1, 30, 512])
async def test_every_distribution_equals_the_reference(running, reference, prefill_chunk):
    text, seen = TEXT[:40] if prefill_chunk == 1 else TEXT, Seen()
    with running(prefill_chunk=prefill_chunk) as engine:
        await engine.visit_logprobs(FAMILIES, text, seen)
    assert seen.targets == list(text[1:])
    shown = torch.cat(seen.logprobs, dim=1).numpy()
    for name, rows in zip(FAMILIES, shown, strict=True):
        expected, _ = reference("arithmetic", {name: 1}, text)
        assert np.abs(rows - expected[:-1]).max() <= TOLERANCE_NATS


async def test_a_member_reads_each_token_once_and_adapters_share_their_forward(running, members, monkeypatch):
    forwards: list[int] = []
    forward = Backbone.forward

    def counted(self, spans):
        forwards.append(len(spans))
        return forward(self, spans)

    steps: list[StepStats] = []
    monkeypatch.setattr(Backbone, "forward", counted)
    with running(on_step=steps.append) as engine:
        await engine.visit_logprobs(("llama", "red", "blue"), TEXT, Seen())
    read = {name: sum(step.num_tokens[name] for step in steps) for name in ("llama", "red", "blue")}
    assert read == dict.fromkeys(read, len(TEXT) - 1)  # nothing follows the last token
    assert forwards == [3] * len(steps)


async def test_texts_and_requests_run_side_by_side(engine, reference):
    seen = [Seen() for _ in range(4)]
    texts = [TEXT[place : place + 20 + 30 * place] for place in range(4)]
    answer, *_ = await asyncio.gather(
        collect(OnEngine(engine, Mixture({"llama": 1})), ask(seed=1, max_tokens=30)),
        *(engine.visit_logprobs(("llama", "deep"), text, one) for text, one in zip(texts, seen, strict=True)),
    )
    assert len(answer.choices[0].token_ids) == 30
    for text, one in zip(texts, seen, strict=True):
        expected, _ = reference("arithmetic", {"deep": 1}, text)
        assert np.abs(torch.cat(one.logprobs, dim=1)[1].numpy() - expected[:-1]).max() <= TOLERANCE_NATS


async def test_an_error_of_the_visitor_ends_its_own_call_alone(engine):
    def broken(logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        raise KeyError("my own")

    seen = Seen()
    good = asyncio.create_task(engine.visit_logprobs(("llama",), TEXT, seen))
    with pytest.raises(KeyError, match="my own"):
        await engine.visit_logprobs(("llama",), TEXT, broken)
    await good
    assert len(seen.targets) == len(TEXT) - 1


async def test_cancelling_the_call_ends_the_reading(running):
    with running(prefill_chunk=1) as engine:
        seen = Seen()
        task = asyncio.create_task(engine.visit_logprobs(("llama",), TEXT, seen))
        while not seen.targets:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await collect(OnEngine(engine, Mixture({"llama": 1})), ask(max_tokens=2))
        num_seen = len(seen.targets)
        await asyncio.sleep(0.05)
        assert len(seen.targets) == num_seen < len(TEXT) - 1


async def test_a_text_of_one_token_shows_nothing(engine):
    seen = Seen()
    await engine.visit_logprobs(("llama",), TEXT[:1], seen)
    assert seen.targets == []


async def test_what_cannot_be_read_is_refused(running):
    with running() as engine:
        with pytest.raises(ContextLengthError, match="300 tokens; the context of llama, deep holds 256"):
            await engine.visit_logprobs(("llama", "deep"), (5,) * 300, Seen())
        with pytest.raises(RequestError, match="token id 320"):
            await engine.visit_logprobs(("llama",), (5, 320), Seen())
        with pytest.raises(ModelLoadError, match="nobody"):
            await engine.visit_logprobs(("nobody",), (5, 6), Seen())
    with pytest.raises(EngineDeadError):
        await engine.visit_logprobs(("llama",), (5, 6), Seen())


async def test_a_member_that_gives_nan_is_named(running, monkeypatch):
    forward = Backbone.forward

    def poisoned(self, spans):
        rows = forward(self, spans)
        return [torch.full_like(row, torch.nan) for row in rows] if self is sick else rows

    with running() as engine:
        sick = engine._members["deep"].backbone
        monkeypatch.setattr(Backbone, "forward", poisoned)
        with pytest.raises(MemberError, match=r"member 'deep': .*NaN"):
            await engine.visit_logprobs(("llama", "deep"), TEXT, Seen())
