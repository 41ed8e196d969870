"""A row is answered in process exactly as a client is answered over HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import pytest_asyncio

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.ensembles.errors import EngineDeadError, OverloadedError
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.running.answering import answer
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.engines.transformers_engine import job
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import asgi_client

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one engine for all of them
CHAT, TEXT, VECTORS, LABELS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"
USER = [{"role": "user", "content": "To be?"}]


def row(url: str = CHAT, **body: Any) -> Row:
    body = ({"messages": USER} if url == CHAT else {}) | body
    common = {CHAT: {"model": "base", "max_tokens": 4}, TEXT: {"model": "base", "max_tokens": 4}}.get(url, {})
    return Row(0, "a", url, common | body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(tiny_config: dict[str, Any]) -> AsyncIterator[Hosting]:
    async with Hosting.open(parse_config(tiny_config, source=Path("/config.yaml"))) as hosting:
        yield hosting


def timeless(value: Any) -> Any:
    """`value` without what is made anew for every answer, and numbers as exact as batches of other sizes give them."""
    match value:
        case dict():
            is_call = value.get("type") == "function"
            return {
                key: timeless(item)
                for key, item in value.items()
                if key != "created" and not (key == "id" and (is_call or "object" in value))
            }
        case list():
            return [timeless(item) for item in value]
        case float():
            return round(value, 4)
    return value


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "f", "parameters": SCHEMA}
GOOD = {
    "greedy": row(temperature=0),
    "choices with seeds": row(n=3, seed=7),
    "a mixture": row(model="mix", seed=1, ensemble={"weights": {"red": 1}}),
    "explained": row(model="mix", temperature=0, ensemble={"explain": True}),
    "a vote": row(model="crowd", seed=3),
    "logprobs": row(temperature=0, logprobs=True, top_logprobs=2, return_token_ids=True, prompt_logprobs=1),
    "a schema": row(
        temperature=0,
        max_tokens=20,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ),
    "a forced tool": row(
        temperature=0,
        max_tokens=30,
        tools=[{"type": "function", "function": FUNCTION}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    ),
    "raw text": row(TEXT, prompt="To be", temperature=0, logprobs=2, echo=True),
    "several prompts": row(TEXT, prompt=["a", "b"], seed=5, n=2),
    "token ids": row(TEXT, prompt=[5, 6, 7], temperature=0, return_token_ids=True),
    "labels": row(LABELS, model="crowd", prompt="The fox is", labels=["good", "bad"]),
    "labels of a chat": row(LABELS, model="mix", messages=USER, labels=["good", "bad"], normalise="bytes"),
}
BAD = {
    "out of range": row(temperature=3),
    "unknown model": row(model="bose"),
    "no messages": row(messages=[]),
    "unhonoured": row(functions=[]),
    "a field that is missing": Row(0, "a", TEXT, {"model": "base"}),
    "too long": row(TEXT, prompt="x " * 500),
    "foreign token": row(TEXT, prompt=[99999]),
    "bad bias": row(logit_bias={"x": 1}),
    "no such member": row(model="mix", ensemble={"weights": {"blue": 1}}),
    "bad schema": row(structured_outputs={"regex": "("}),
    "tools of no use": row(tool_choice="required"),
    "one label": row(LABELS, model="base", prompt="The fox is", labels=["good"]),
    "labels without a prompt": row(LABELS, model="base", labels=["good", "bad"]),
    "labels by nobody": row(LABELS, model="bose", prompt="The fox is", labels=["good", "bad"]),
}


@pytest.mark.parametrize("asked", GOOD.values(), ids=GOOD)
async def test_a_row_says_what_a_client_is_told(hosting: Hosting, asked: Row) -> None:
    result = await answer(hosting, asked)
    async with asgi_client(hosting) as client:
        response = await client.post(asked.url, json=asked.body)
    assert response.status_code == result.status_code == 200, response.text
    assert timeless(orjson.loads(orjson.dumps(result.body))) == timeless(response.json())


@pytest.mark.parametrize("asked", BAD.values(), ids=BAD)
async def test_a_wrong_row_gets_the_error_that_a_client_gets(hosting: Hosting, asked: Row) -> None:
    result = await answer(hosting, asked)
    async with asgi_client(hosting) as client:
        response = await client.post(asked.url, json=asked.body)
    assert (result.status_code, result.body) == (response.status_code, response.json())
    assert 400 <= result.status_code < 500 and result.usage == {}


async def test_an_unknown_parameter_is_an_error_of_the_row(scripted) -> None:
    refused = await answer(scripted(), row(model="m", temprature=1))
    assert refused.status_code == 400
    assert refused.body["error"]["message"].startswith("unknown parameter 'temprature'; did you mean 'temperature'?")


async def test_tools_whose_calls_nobody_could_read_are_an_error_of_the_row(hosting: Hosting) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    refused = await answer(hosting, row(tools=tools))
    assert (refused.status_code, refused.body["error"]["param"]) == (400, "tools")
    assert (await answer(hosting, row(tools=tools, tool_choice="none", max_tokens=2))).status_code == 200


async def test_embeddings_are_answered_too(scripted) -> None:
    result = await answer(scripted(), row(VECTORS, input=["ab", "b"]))
    assert [vector["embedding"] for vector in result.body["data"]] == [pytest.approx([0.5**0.5] * 2 + [0]), [0, 1, 0]]
    assert result.usage == {"letters": MemberUsage(2)}
    unknown = await answer(scripted(), row(VECTORS, input="a", model="words"))
    assert (unknown.status_code, unknown.body["error"]["code"]) == (404, "model_not_found")


async def test_a_row_cannot_be_streamed(scripted) -> None:
    result = await answer(scripted(), row(model="m", stream=True))
    assert (result.status_code, result.body["error"]["param"]) == (400, "stream")


async def test_no_clock_is_in_an_answer(scripted) -> None:
    once, again, other = [await answer(scripted(), row(model="m", seed=seed)) for seed in (1, 1, 2)]
    assert once == again
    assert once.body["created"] == 0
    assert once.request_id != other.request_id and once.body["id"] != other.body["id"]


async def test_usage_is_each_members_own(hosting: Hosting) -> None:
    result = await answer(hosting, row(model="mix", temperature=0))
    assert set(result.usage) == {"base", "red"}
    assert all(used.completion_tokens == 4 and used.prompt_tokens > 4 for used in result.usage.values())


async def test_a_member_that_fails_is_the_rows_error(scripted) -> None:
    result = await answer(scripted(m=Script(("a", "b"), fails_at=1)), row(model="m"))
    assert (result.status_code, result.body["error"]["code"]) == (502, "member_failed")
    assert "member 'm'" in result.body["error"]["message"]


async def test_a_defect_of_ours_is_logged_and_told_as_one(scripted, caplog: pytest.LogCaptureFixture) -> None:
    result = await answer(scripted(m=Script(("a",), fails_at=0, error=ZeroDivisionError("oh"))), row(model="m"))
    assert (result.status_code, result.body["error"]["code"]) == (500, "internal_error")
    assert "row 'a' failed: oh" in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("error", [OverloadedError("full"), EngineDeadError("gone")])
async def test_what_is_not_the_rows_fault_is_raised(scripted, error: Exception) -> None:
    with pytest.raises(type(error)):
        await answer(scripted(m=Script(("a",), fails_at=0, error=error)), row(model="m"))


async def test_a_row_yields_to_clients_and_has_the_shorter_of_two_limits(scripted) -> None:
    hosting = scripted({"request_timeout_s": 5})
    await answer(hosting, row(model="m"), deadline_s=3)
    await answer(hosting, row(TEXT, model="m", prompt="x"), deadline_s=30, priority=2)
    asked = hosting.models["m"].requests
    assert [(request.priority, request.deadline_s) for request in asked] == [(1, 3), (2, 5)]


async def test_an_answer_that_its_deadline_cut_says_so(hosting: Hosting, monkeypatch: pytest.MonkeyPatch) -> None:
    long = row(max_tokens=100, temperature=0, ignore_eos=True)
    whole = await answer(hosting, long)
    ticks = itertools.count()  # the engine's clock: a second whenever it is looked at, which is in every step
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    cut = await answer(hosting, long, deadline_s=30)
    assert not whole.is_cut
    assert cut.is_cut and 0 < cut.body["usage"]["completion_tokens"] < 100
    assert cut.body["choices"][0]["stop_reason"] == "deadline"


async def test_a_cancelled_row_frees_its_model(scripted) -> None:
    hosting = scripted(m=Script(("a",), stalls_at=0))
    task = asyncio.create_task(answer(hosting, row(model="m")))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() and hosting.models["m"].num_live == 0
