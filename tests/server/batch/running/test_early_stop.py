from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.ensembles.errors import MemberError, OverloadedError
from ensemble_server.server.batch.job.rows import Row, Url
from ensemble_server.server.batch.running.answering import answer
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import ScriptedHosting

CHAT: Url = "/v1/chat/completions"
HostingMaker = Callable[..., ScriptedHosting]


def row(n: int = 8, kind: str = "number", **body: Any) -> Row:
    messages = [{"role": "user", "content": "6 x 7?"}]
    return Row(0, "a", CHAT, {"messages": messages, "n": n, "stop_when_decided": kind, "seed": 1, **body})


def saying(*texts: str | Exception) -> Callable[[GenerationRequest, int], Script]:
    """The k-th request is told the k-th text."""
    left = list(texts)

    def script(request: GenerationRequest, index: int) -> Script:
        text = left.pop(0)
        return Script(fails_at=0, error=text) if isinstance(text, Exception) else Script((text,))

    return script


def contents(body: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in body["choices"]]


@pytest.mark.parametrize(
    ("texts", "num_asked", "elected"),
    [
        (["42"] * 8, 4, "42"),
        (["42", "42", "7", "42", "42"], 5, "42"),  # after four, one more could decide
        (["7", "42", "42", "42", "42", "42"], 6, "42"),  # five are asked, and 42 may still be drawn level with
        (["1", "2", "1", "2", "1", "2", "1", "2"], 7, "1"),  # the last could only draw level
        (["none", "none", "none", "none", "42", "42"], 6, "42"),
    ],
)
async def test_no_sample_is_asked_for_that_the_vote_does_not_need(
    scripted: HostingMaker, texts: Sequence[str], num_asked: int, elected: str
) -> None:
    hosting = scripted(m=saying(*texts))
    result = await answer(hosting, row())
    assert len(hosting.models["m"].requests) == num_asked
    assert contents(dict(result.body)) == list(texts[:num_asked])
    vote = result.body["vote"]
    assert vote["answer"] == elected
    assert (vote["samples"], vote["samples_saved"]) == (8, 8 - num_asked)
    assert texts[vote["winner"]] == elected
    assert [choice["index"] for choice in result.body["choices"]] == list(range(num_asked))


async def test_samples_have_seeds_of_their_own_and_what_they_used_is_summed(scripted: HostingMaker) -> None:
    hosting = scripted(m=saying("42", "7", "42"))
    result = await answer(hosting, row(3))
    seeds = [request.sampling.seed for request in hosting.models["m"].requests]
    assert seeds[0] == 1
    assert len(set(seeds)) == 3
    assert result.body["usage"]["completion_tokens"] == 3
    assert result.usage["m"].completion_tokens == 3
    assert result.body["ensemble"]["usage"]["m"]["completion_tokens"] == 3


async def test_a_sample_that_fails_abstains(scripted: HostingMaker) -> None:
    hosting = scripted(m=saying(MemberError("m", "is gone"), "42", "42"))
    result = await answer(hosting, row(4))
    assert contents(dict(result.body)) == ["42", "42"]
    assert result.body["vote"]["silent"] == [{"sample": 0, "reason": "member 'm': is gone"}]
    assert result.body["vote"]["winner"] == 0


async def test_if_all_samples_fail_the_row_has_the_first_error(scripted: HostingMaker) -> None:
    result = await answer(scripted(m=saying(MemberError("m", "first"), MemberError("m", "second"))), row(2))
    assert result.status_code == 502
    assert result.body["error"]["message"] == "member 'm': first"


async def test_a_full_queue_is_no_vote(scripted: HostingMaker) -> None:
    with pytest.raises(OverloadedError):
        await answer(scripted(m=saying("42", OverloadedError("full"), "42")), row(3))


async def test_when_time_is_over_the_vote_is_among_those_who_answered(scripted: HostingMaker) -> None:
    texts = iter(["1", "2", "3", "3", "3", "3", "3", "3"])

    def slow(request: GenerationRequest, index: int) -> Script:
        return Script((next(texts),), start_delay_s=0.15)

    result = await answer(scripted(m=slow), row(), deadline_s=0.1)
    assert result.is_ok
    assert len(result.body["choices"]) == 4  # the first wave, and no second
    assert result.body["vote"]["answer"] == "3"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stop_when_decided": "numbers"}, "stop_when_decided"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "8"}, "n"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_cannot_be_voted_on_is_refused_by_name(
    scripted: HostingMaker, changes: dict[str, Any], param: str
) -> None:
    result = await answer(scripted(m=saying("42")), row(**{"n": 2} | changes))
    assert result.status_code == 400
    assert result.body["error"]["param"] == param


async def test_embeddings_are_not_voted_on(scripted: HostingMaker) -> None:
    result = await answer(scripted(), Row(0, "a", "/v1/embeddings", {"input": "x", "stop_when_decided": "text"}))
    assert "draws no samples" in result.body["error"]["message"]


@pytest.fixture
async def hosting(tiny_config: dict[str, Any]) -> AsyncIterator[Hosting]:
    async with Hosting.open(parse_config(tiny_config, source=Path("/config.yaml"))) as hosting:
        yield hosting


@pytest.mark.parametrize("url", [CHAT, "/v1/completions"])
async def test_real_samples_repeat_and_are_those_of_separate_rows(hosting: Hosting, url: Url) -> None:
    prompt = {"messages": [{"role": "user", "content": "To be?"}]} if url == CHAT else {"prompt": "To be"}
    body = {"model": "base", "max_tokens": 3, "n": 4, "stop_when_decided": "text", "seed": 3, **prompt}
    first, second = [await answer(hosting, Row(0, "a", url, body)) for _ in range(2)]
    assert first == second
    single = {**body, "n": 1}
    del single["stop_when_decided"]
    alone = await answer(hosting, Row(0, "a", url, single))
    assert first.body["choices"][0] == alone.body["choices"][0]
    assert first.body["vote"]["samples"] == 4
