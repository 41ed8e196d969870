"""Limits of keys over the whole API: one rule for every route and for rows of batches."""

from __future__ import annotations

import asyncio
import hashlib
import json

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ensemble_server.server.engines.scripted_engine import Script
from tests.server.api.conftest import CHAT, HELLO, asgi_client, events_of, live_server, until

ASKED = CHAT | {"model": "hello"}
TEAM = {"authorization": "Bearer team-key"}
OTHER = {"authorization": "Bearer other-key"}
POSTS = {
    "/v1/chat/completions": ASKED,
    "/v1/completions": {"model": "hello", "prompt": "x"},
    "/v1/responses": {"model": "hello", "input": "x"},
    "/v1/messages": ASKED | {"max_tokens": 9},
    "/v1/embeddings": {"input": "a b"},
    "/v1/vote": {"candidates": ["a", "b"]},
    "/tokenize": {"model": "hello", "prompt": "x"},
    "/detokenize": {"model": "hello", "tokens": [1]},
}


def limited(**limits):
    digest = f"sha256:{hashlib.sha256(b'team-key').hexdigest()}"
    return {"keys": {"team": {"key": digest, **limits}, "other": {"key": "other-key"}}}


def with_keys(host, keys, **scripts):
    hosting = host(**scripts)
    config = type(hosting.config.server).model_validate(keys)
    hosting.change("server", keys=config.keys, limits=config.limits)
    return hosting


async def listed(client, headers) -> list[str]:
    """The models that generate; the embedding model is everybody's."""
    models = (await client.get("/v1/models", headers=headers)).json()["data"]
    return [model["id"] for model in models if model["kind"] != "embedding"]


async def metrics_of(client) -> dict[tuple, float]:
    text = (await client.get("/metrics", headers=OTHER)).text
    families = text_string_to_metric_families(text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


@pytest.mark.parametrize("path", POSTS)
async def test_every_route_counts_its_requests_and_refuses_those_beyond_the_limit(host, path):
    async with asgi_client(with_keys(host, limited(requests_per_minute=2))) as client:
        for remaining in ("1", "0"):
            answer = await client.post(path, json=POSTS[path], headers=TEAM)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == remaining
            assert answer.headers["x-ratelimit-reset-requests"] in ("1m0s", "1m1s")
        refused = await client.post(path, json=POSTS[path], headers=TEAM)
        free = await client.post(path, json=POSTS[path], headers=OTHER)
        counted = await metrics_of(client)
    assert refused.status_code == 429
    assert refused.json()["error"].get("code") == ("rate_limit_exceeded" if path != "/v1/messages" else None)
    assert "key 'team' has used its 2 requests a minute" in refused.json()["error"]["message"]
    assert 59 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert free.status_code == 200
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert counted["ensemble:rejections_total", "requests"] == 1
    assert counted["ensemble:key_requests_total", "team"] == 2
    assert counted["ensemble:key_refusals_total", "team", "requests"] == 1
    assert "team-key" not in refused.text + str(counted)


async def test_tokens_are_charged_as_usage_counts_them_and_then_no_request_is_let_in(host):
    async with asgi_client(with_keys(host, limited(tokens_per_minute=60))) as client:
        answer = await client.post("/v1/chat/completions", json=ASKED, headers=TEAM)
        used = answer.json()["usage"]["total_tokens"]
        assert 0 < used < 60
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
        assert usage["remaining"] == {"tokens_per_minute": 60 - used}
        while answer.status_code == 200:
            answer = await client.post("/v1/completions", json={"model": "hello", "prompt": "x " * 5}, headers=TEAM)
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
    assert answer.status_code == 429
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert usage["prompt_tokens"] + usage["completion_tokens"] >= 60
    assert usage["refused"] == 1


@pytest.mark.parametrize(("path", "body"), [("/v1/embeddings", {"input": ["a b c", "d"]})])
async def test_what_is_answered_in_one_piece_is_charged_too(host, path, body):
    async with asgi_client(with_keys(host, limited(tokens_per_minute=100))) as client:
        answer = (await client.post(path, json=body, headers=TEAM)).json()
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
    assert usage["remaining"]["tokens_per_minute"] == 100 - answer["usage"]["total_tokens"] < 100
    assert list(usage["models"]) == [answer["model"]]


async def test_a_stream_is_charged_while_it_runs_and_one_that_is_broken_off_has_cost_what_came(host):
    slow = Script(("a",) * 5, stalls_at=3)
    hosting = with_keys(host, limited(tokens_per_minute=1000), hello=slow)
    async with live_server(hosting) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="team-key") as client:
        stream = await client.chat.completions.create(**ASKED, stream=True)
        seen = 0
        async for chunk in stream:
            seen += bool(chunk.choices[0].delta.content)
            if seen == 3:
                break
        running = await client.get("/usage", cast_to=object)
        await stream.close()
        ended = running
        async with asyncio.timeout(10):
            while ended["streams"]:
                ended = await client.get("/usage", cast_to=object)
        async with asyncio.timeout(10):
            while not ended["completion_tokens"]:
                ended = await client.get("/usage", cast_to=object)
    assert running["streams"] == 1
    assert running["remaining"]["tokens_per_minute"] < 1000
    assert ended["completion_tokens"] == 3
    assert ended["remaining"] == running["remaining"]


async def test_only_so_many_answers_stream_at_once(host):
    stalled = Script(("a",), stalls_at=1)
    hosting = with_keys(host, limited(streams_at_once=1), stalled=stalled, hello=HELLO)
    async with (
        live_server(hosting) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="team-key", max_retries=0) as client,
    ):
        first = await client.chat.completions.create(**ASKED | {"model": "stalled"}, stream=True)
        with pytest.raises(openai.RateLimitError, match="1 streams open, 1 are allowed"):
            await client.chat.completions.create(**ASKED, stream=True)
        whole = await client.chat.completions.create(**ASKED)
        await first.close()
        await until(lambda: hosting.models["stalled"].num_live == 0)
        second = None
        async with asyncio.timeout(10):
            while second is None:
                try:
                    second = await client.chat.completions.create(**ASKED, stream=True)
                except openai.RateLimitError:
                    await asyncio.sleep(0.01)
        said = [chunk.choices[0].delta.content or "" async for chunk in second if chunk.choices]
    assert whole.choices[0].message.content == "".join(said) == "Hello world"


async def test_a_key_sees_and_asks_its_own_models_only(host):
    hosting = with_keys(host, limited(models=["hello"]), hello=HELLO, secret=HELLO)
    async with asgi_client(hosting) as client:
        assert await listed(client, TEAM) == ["hello"]
        assert await listed(client, OTHER) == ["hello", "secret"]
        for path, body in POSTS.items():
            if "model" in body:
                refused = await client.post(path, json=body | {"model": "secret"}, headers=TEAM)
                assert refused.status_code == 403, path
                assert refused.json()["error"].get("code") == ("model_not_allowed" if path != "/v1/messages" else None)
                assert "it may use: hello" in refused.json()["error"]["message"]
        assert (await client.get("/v1/models/secret", headers=TEAM)).status_code == 403
        assert (await client.get("/v1/models/nobody", headers=TEAM)).status_code == 404
        unnamed = await client.post("/v1/chat/completions", json=CHAT, headers=TEAM)  # the only one it has
        counted = await metrics_of(client)
    assert unnamed.json()["model"] == "hello"
    assert counted["ensemble:rejections_total", "model"] == 1 + sum("model" in body for body in POSTS.values())


async def upload(client, lines, headers=TEAM):
    content = "\n".join(json.dumps(line) for line in lines).encode() if isinstance(lines, list) else lines
    return await client.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", content)}, headers=headers
    )


async def test_uploads_are_bounded_by_what_a_key_keeps_and_deleting_makes_room(host):
    async with asgi_client(with_keys(host, limited(upload_bytes=100))) as client:
        kept = await upload(client, b"x" * 60)
        assert kept.status_code == 200
        refused = await upload(client, b"x" * 41)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "upload_quota_exceeded"
        assert "may keep 100 bytes of uploads and keeps 60" in refused.json()["error"]["message"]
        assert (await upload(client, b"x" * 40)).status_code == 200
        assert (await upload(client, b"x" * 4000, headers=OTHER)).status_code == 200
        await client.delete(f"/v1/files/{kept.json()['id']}", headers=TEAM)
        assert (await upload(client, b"x" * 60)).status_code == 200
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
    assert (usage["upload_bytes"], usage["refused"], usage["requests"]) == (160, 1, 0)


def row(number: int, model: str = "hello") -> dict:
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": CHAT | {"model": model}}


async def begun(client, rows) -> str:
    file_id = (await upload(client, rows)).json()["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    answer = await client.post("/v1/batches", json=asked, headers=TEAM)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def state_of(client, batch_id) -> dict:
    return (await client.get(f"/v1/batches/{batch_id}", headers=TEAM)).json()


async def reached(client, batch_id, condition) -> dict:
    async with asyncio.timeout(30):
        while not condition(state := await state_of(client, batch_id)):
            await asyncio.sleep(0.02)
    return state


async def test_rows_of_a_batch_count_as_requests_do_and_wait_for_their_turn(host):
    hosting = with_keys(host, limited(requests_per_minute=3))
    async with asgi_client(hosting) as client:
        await client.post("/v1/chat/completions", json=ASKED, headers=TEAM)
        batch_id = await begun(client, [row(number) for number in range(5)])
        await reached(client, batch_id, lambda state: state["request_counts"]["completed"] == 2)
        beside = await client.post("/v1/chat/completions", json=ASKED, headers=TEAM)
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
        await client.post(f"/v1/batches/{batch_id}/cancel", headers=TEAM)
        state = await reached(client, batch_id, lambda state: state["status"] == "cancelled")
    assert beside.status_code == 429
    assert usage["requests"] == 3
    assert (state["request_counts"]["total"], state["request_counts"]["completed"]) == (5, 2)
    assert len(hosting.models["hello"].requests) == 3


async def test_tokens_of_rows_are_charged_and_models_of_others_fail_their_row(host):
    hosting = with_keys(host, limited(models=["hello"], tokens_per_minute=1000), hello=HELLO, secret=HELLO)
    async with asgi_client(hosting) as client:
        batch_id = await begun(client, [row(0), row(1, "secret")])
        state = await reached(client, batch_id, lambda state: state["status"] == "completed")
        errors = await client.get(f"/v1/files/{state['error_file_id']}/content", headers=TEAM)
        usage = (await client.get("/v1/usage", headers=TEAM)).json()
    failed = json.loads(errors.text)
    assert failed["response"]["status_code"] == 403
    assert failed["response"]["body"]["error"]["code"] == "model_not_allowed"
    spent = 1000 - usage["remaining"]["tokens_per_minute"]
    assert spent == usage["prompt_tokens"] + usage["completion_tokens"] > 4
    assert hosting.models["secret"].requests == []


async def test_without_keys_the_limits_hold_for_all_callers_together(host):
    hosting = with_keys(host, {"limits": {"requests_per_minute": 1, "models": ["hello"]}}, hello=HELLO, more=HELLO)
    async with asgi_client(hosting) as client:
        assert await listed(client, {}) == ["hello"]
        assert (await client.post("/v1/chat/completions", json=ASKED)).status_code == 200
        refused = await client.post("/v1/chat/completions", json=ASKED)
        usage = (await client.get("/v1/usage")).json()
    assert refused.status_code == 429
    assert (usage["key"], usage["requests"], usage["refused"]) == ("everyone", 1, 1)
    assert usage["limits"] == {"requests_per_minute": 1, "models": ["hello"]}


async def test_nothing_is_limited_that_is_not_said(host):
    async with asgi_client(host()) as client:
        answers = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(30)]
        usage = (await client.get("/v1/usage")).json()
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]
    assert (usage["requests"], usage["limits"], usage["remaining"]) == (30, {}, {})


async def test_an_error_of_a_limit_in_a_stream_is_an_answer_with_its_status(host):
    async with asgi_client(with_keys(host, limited(requests_per_minute=1))) as client:
        first = await client.post("/v1/chat/completions", json=ASKED | {"stream": True}, headers=TEAM)
        second = await client.post("/v1/chat/completions", json=ASKED | {"stream": True}, headers=TEAM)
    assert events_of(first.text)[-1] == "[DONE]"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert second.status_code == 429
