"""How requests end when the server does."""

from __future__ import annotations

import asyncio

import httpx

from ensemble_server.server.api.admission import Admission
from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.metrics import Metrics
from tests.server.api.conftest import CHAT, events_of, until

CHAT_PATH = "/v1/chat/completions"


async def test_draining_lets_live_requests_finish_and_nobody_in(host):
    hosting = host(m=Script(tuple("abcd"), delay_s=0.1))
    app = create_app(hosting, metrics=Metrics())
    config = hosting.config.server.model_copy(update={"port": 0})
    async with listening(app, config) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        live = [asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": stream})) for stream in (True, False)]
        await until(lambda: hosting.models["m"].num_live == 2)
        draining = asyncio.create_task(app.state.admission.drain(timeout_s=5))
        await asyncio.sleep(0.05)
        late = await client.post(CHAT_PATH, json=CHAT)
        streamed, whole = await asyncio.gather(*live)
        await draining
    assert late.status_code == 503
    assert events_of(streamed.text)[-1] == "[DONE]"
    assert "error" not in streamed.text
    assert whole.json()["choices"][0]["message"]["content"] == "abcd"


async def test_draining_cancels_who_takes_too_long_and_tells_them(host):
    hosting = host(m=Script(("a", "b"), stalls_at=1))
    app = create_app(hosting, metrics=Metrics())
    config = hosting.config.server.model_copy(update={"port": 0})
    async with listening(app, config) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        live = [asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": stream})) for stream in (True, False)]
        await until(lambda: hosting.models["m"].num_live == 2)
        await app.state.admission.drain(timeout_s=0.1)
        assert hosting.models["m"].num_live == 0
        streamed, whole = await asyncio.gather(*live)
    assert whole.status_code == 503
    assert "shutting down" in whole.json()["error"]["message"]
    *_, failure, end = events_of(streamed.text)
    assert "shutting down" in failure
    assert end == "[DONE]"


async def test_draining_an_idle_server_waits_for_nothing(host):
    await asyncio.wait_for(Admission(host()).drain(timeout_s=3600), 20)
