"""The process: its port answers while it loads, signals stop it, live requests finish first."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import aclosing, asynccontextmanager

import httpx
import pytest

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.api import serve as serve_module
from ensemble_server.server.api.serve import serve
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import CHAT, events_of, until

CHAT_PATH = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _root_logger_stays_as_it_was():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def opened(monkeypatch):
    """Makes `Hosting.open` give a hosting of ours, once `loaded` is set; `loaded` may be an error instead.

    Returns an event that is set once it is being opened.
    """

    def put(hosting, loaded):
        begun = asyncio.Event()

        @asynccontextmanager
        async def open_(config, *, on_step=None):
            begun.set()
            if isinstance(loaded, Exception):
                raise loaded
            await loaded.wait()
            yield hosting
            hosting.is_closed = True

        monkeypatch.setattr(Hosting, "open", open_)
        return begun

    return put


@pytest.fixture
def ports(monkeypatch):
    """A queue of the ports that servers listen on, as soon as they do."""
    ports, listening = asyncio.Queue(), serve_module.listening

    @asynccontextmanager
    async def noted(app, config):
        async with listening(app, config) as port:
            ports.put_nowait(port)
            yield port

    monkeypatch.setattr(serve_module, "listening", noted)
    return ports


class Held(ScriptedModel):
    """Says its first piece, and the others once `go_on` is set."""

    def __init__(self, *pieces):
        super().__init__("m", Script(pieces))
        self.go_on = asyncio.Event()

    async def generate(self, request):
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield event
                await self.go_on.wait()


async def until_closed(client):
    """Wait until the server lets nobody in any more."""
    while (await client.get("/health")).status_code != 503:
        await asyncio.sleep(0.005)


def already():
    event = asyncio.Event()
    event.set()
    return event


async def test_the_port_answers_503_while_the_models_load(host, opened, ports):
    hosting, loaded, ready = host({"port": 0}), asyncio.Event(), []
    opened(hosting, loaded)
    serving = asyncio.create_task(serve(hosting.config, on_ready=ready.append))
    port = await ports.get()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        live, health = await client.get("/live"), await client.get("/health")
        chat = await client.post(CHAT_PATH, json=CHAT)
        assert (live.status_code, health.status_code, chat.status_code) == (200, 503, 503)
        assert "loading" in chat.json()["error"]["message"]
        assert chat.headers["retry-after"]
        assert ready == []
        loaded.set()
        await until(lambda: ready == [port])
        assert (await client.get("/health")).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert hosting.is_closed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_server_once_live_requests_are_done(host, opened, number):
    model, ready = Held(*"abcd"), []
    hosting = host({"port": 0}, m=model)
    opened(hosting, already())
    serving = asyncio.create_task(serve(hosting.config, on_ready=ready.append))
    await until(lambda: bool(ready))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready[0]}", timeout=60) as client:
        live = asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": True}))
        await until(lambda: model.num_live == 1)
        os.kill(os.getpid(), number)
        await until_closed(client)
        late = await client.post(CHAT_PATH, json=CHAT)
        model.go_on.set()
        text = (await live).text
    await serving
    assert late.status_code == 503
    assert "".join(events_of(text)).count('"content"') == 5
    assert text.endswith("data: [DONE]\n\n")


async def test_a_second_signal_ends_live_requests_at_once(host, opened):
    hosting, ready = host({"port": 0}, m=Script(("a", "b"), stalls_at=1)), []
    opened(hosting, already())
    serving = asyncio.create_task(serve(hosting.config, on_ready=ready.append))
    await until(lambda: bool(ready))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready[0]}", timeout=60) as client:
        live = asyncio.create_task(client.post(CHAT_PATH, json=CHAT | {"stream": True}))
        await until(lambda: hosting.models["m"].num_live == 1)
        os.kill(os.getpid(), signal.SIGINT)
        await until_closed(client)
        assert not serving.done()
        os.kill(os.getpid(), signal.SIGINT)
        text = (await live).text
        await serving
    assert "shutting down" in text


async def test_a_signal_while_loading_stops_the_server(host, opened):
    hosting = host({"port": 0})
    begun = opened(hosting, asyncio.Event())
    serving = asyncio.create_task(serve(hosting.config))
    await begun.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


async def test_models_that_do_not_load_are_the_error(host, opened):
    hosting = host({"port": 0})
    opened(hosting, ModelLoadError("model 'base': no such folder"))
    with pytest.raises(ModelLoadError, match="no such folder"):
        await serve(hosting.config)


async def test_an_address_that_is_taken_is_a_config_error(host, opened):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hosting = host({"port": listener.getsockname()[1]})
        opened(hosting, already())
        with pytest.raises(ConfigError, match="choose another host or port"):
            await serve(hosting.config)
