"""Streams over a real connection: as they come, kept alive, and freed when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time

import httpx
import openai
import pytest

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import CHAT, asgi_client, events_of, live_server, until

SLOW = Script(tuple("abcdefghij"), delay_s=0.05)
STALLED = Script(("a", "b", "c"), stalls_at=2)
CHAT_PATH = "/v1/chat/completions"


async def test_tokens_arrive_as_they_are_made(host):
    async with live_server(host(m=SLOW)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        started = time.perf_counter()
        stream = await client.chat.completions.create(model="m", stream=True, **CHAT)
        arrivals = [time.perf_counter() - started async for chunk in stream if chunk.choices[0].delta.content]
    assert len(arrivals) == 10
    assert arrivals[-1] - arrivals[0] > 0.25  # all at once would be at the end


def test_the_synchronous_openai_client_streams_too(host):
    """In a thread, as its users run it; the server runs in this one's loop."""

    def talk(url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(
                model="hello", stream=True, stream_options={"include_usage": True}, **CHAT
            )
            chunks = list(stream)
            whole = client.chat.completions.create(model="hello", **CHAT)
            text = client.completions.create(model="hello", prompt="x", stream=True)
            return chunks, whole, "".join(chunk.choices[0].text for chunk in text)

    async def run():
        async with live_server(host()) as url:
            return await asyncio.to_thread(talk, url)

    chunks, whole, text = asyncio.run(run())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello world"
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].message.content == text == "Hello world"


async def test_the_openai_clients_stream_helper_collects_the_answer(host):
    async with live_server(host()) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        async with client.chat.completions.stream(model="hello", **CHAT) as stream:
            completion = await stream.get_final_completion()
        vector = await client.embeddings.create(model="letters", input="abc")
        models = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("hello")
    assert completion.choices[0].message.content == "Hello world"
    assert vector.data[0].embedding == pytest.approx([3**-0.5] * 3)
    assert models == [one.id, "letters"]


@pytest.mark.parametrize(("stream", "logged"), [(True, (200, "client_left")), (False, (499, ""))])
async def test_a_client_that_leaves_frees_its_generation(host, caplog, stream, logged):
    caplog.set_level(logging.INFO)
    hosting = host(m=STALLED)
    model = hosting.models["m"]
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:
        asked = asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": stream}))
        await until(lambda: model.num_live == 1)
        asked.cancel()
        await until(lambda: model.num_live == 0)
        await until(lambda: any(record.name == "ensemble.access" for record in caplog.records))
    [line] = [record.fields for record in caplog.records if record.name == "ensemble.access"]
    assert (line["status"], line["error"]) == logged


async def test_a_client_that_leaves_before_the_first_token_frees_its_generation(host):
    hosting = host(m=ScriptedModel("m", Script(("a",), stalls_at=0)))
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:
        asked = asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": True}))
        await until(lambda: hosting.models["m"].num_live == 1)
        asked.cancel()
        await until(lambda: hosting.models["m"].num_live == 0)


async def test_a_client_that_leaves_frees_all_its_prompts(host):
    hosting = host(m=STALLED)
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:
        asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a"] * 5, "n": 2}))
        await until(lambda: hosting.models["m"].num_live == 5)
        asked.cancel()
        await until(lambda: hosting.models["m"].num_live == 0)


async def test_one_clients_failure_leaves_the_streams_of_others_alone(host):
    hosting = host(good=SLOW, bad=Script(("x", "y"), fails_at=1), stalled=STALLED)
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:

        def post(model, **body):
            return asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"model": model, "stream": True} | body))

        good = [post("good") for _ in range(4)]
        bad = [post("bad"), post("bad"), post("nobody"), post("good", temperature=9)]
        leaving = post("stalled")
        await until(lambda: hosting.models["stalled"].num_live == 1)
        leaving.cancel()
        statuses = [response.status_code for response in await asyncio.gather(*bad)]
        texts = [response.text for response in await asyncio.gather(*good)]
    assert statuses == [200, 200, 404, 400]
    assert all(len(events_of(text)) == 13 and "error" not in text for text in texts)  # role, ten, finish, [DONE]


async def test_a_silent_stream_is_kept_alive_by_comments(host):
    hosting = host({"keep_alive_interval_s": 0.05}, m=Script(("a", "b"), delay_s=0.3))
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:
        text = (await client.post(CHAT_PATH, json=CHAT | {"stream": True})).text
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as reader:
            stream = await reader.chat.completions.create(model="m", stream=True, **CHAT)
            said = [chunk.choices[0].delta.content async for chunk in stream]
    assert text.count(": still here\n\n") >= 6
    assert [event[0] for event in events_of(text)] == ["{"] * 4 + ["["]
    assert said == ["", "a", "b", None]


async def test_a_busy_stream_has_no_comments(host):
    async with (
        live_server(host({"keep_alive_interval_s": 0.2}, m=SLOW)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        text = (await client.post(CHAT_PATH, json=CHAT | {"stream": True})).text
    assert ": still here" not in text


async def test_an_error_after_a_long_silence_is_an_event_because_the_stream_has_begun(host):
    model = ScriptedModel("m", Script(("a",), start_delay_s=0.2, fails_at=0, error=RequestError("no", param="n")))
    async with asgi_client(host({"keep_alive_interval_s": 0.05}, m=model)) as client:
        response = await client.post(CHAT_PATH, json=CHAT | {"stream": True})
    assert response.status_code == 200
    failure, end = events_of(response.text)
    assert '"param":"n"' in failure
    assert end == "[DONE]"


async def test_a_slow_reader_holds_up_nobody_else(host):
    long = ScriptedModel("long", Script(("x" * 50_000,) * 400))
    hosting = host(long=long, quick=Script(("a",)))
    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        async with client.stream("POST", CHAT_PATH, json=CHAT | {"model": "long", "stream": True}) as unread:
            assert unread.status_code == 200
            response = await client.post(CHAT_PATH, json=CHAT | {"model": "quick"})
        assert response.status_code == 200
        await until(lambda: long.num_live == 0)


async def test_streams_tell_proxies_not_to_hold_them_back(host):
    async with asgi_client(host()) as client:
        response = await client.post(CHAT_PATH, json=CHAT | {"stream": True})
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
