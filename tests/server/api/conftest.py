"""A `Hosting` without an engine: scripted models behind the whole HTTP API, with a real tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ensemble_server.ensembles.base import Delta, Done, MemberUsage, Usage
from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.metrics import Metrics
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE, make_tokenizer

HELLO = Script(("Hel", "lo", " wor", "ld"))
CALL = Script(("Let me look.", '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'))
USED = Usage(3, 4, {"a": MemberUsage(3, 4)})
DONE = Done(USED, method="exchange_of_thought", members=("a", "b"), turnout=1, trace={"rounds": [1]})
THOUGHTFUL = (
    Delta(0, reasoning="Nine ", token_ids=(1,)),
    Delta(0, reasoning="times two.", token_ids=(2, 3)),
    Delta(0, "18", token_ids=(4,), finish_reason="stop"),
    DONE,
)
CHAT = {"messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture(scope="session")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    return Surface(tokenizer(tmp_path_factory.mktemp("tokenizer")))


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


HostingMaker = Callable[..., ScriptedHosting]


@pytest.fixture
def hermes(surface: Surface) -> Surface:
    """Whose template shows tools, and calls in the form of Hermes."""
    template = CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}<tool_call>...</tool_call>{% endif %}"
    return Surface(surface.tokenizer, chat_template=template)


@pytest.fixture
def host(surface: Surface, tmp_path: Path) -> HostingMaker:
    """host(name=Script | function | Model, server_key=value): models that read with the tiny tokenizer."""

    def make(server: dict[str, Any] | None = None, surface: Surface = surface, **scripts: Any) -> ScriptedHosting:
        models = {
            name: script
            if hasattr(script, "generate")
            else ScriptedModel(name, script, surface=surface, max_model_len=512)
            for name, script in (scripts or {"hello": HELLO}).items()
        }
        return ScriptedHosting(models, dict.fromkeys(models, surface), tmp_path / "batches", **(server or {}))

    return make


@asynccontextmanager
async def asgi_client(hosting: ScriptedHosting, **kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose requests go straight into the application."""
    app = create_app(hosting, metrics=Metrics())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://server", **kwargs) as client,
        app.state.batches.running(),
    ):
        client.app = app
        yield client


@asynccontextmanager
async def live_server(hosting: ScriptedHosting) -> AsyncIterator[str]:
    """A real server on a free port of this machine; gives its address."""
    config = hosting.config.server.model_copy(update={"port": 0})
    app = create_app(hosting, metrics=Metrics())
    async with listening(app, config) as port, app.state.batches.running():
        yield f"http://127.0.0.1:{port}"


def events_of(text: str) -> list[str]:
    """The data of each server-sent event; comments are left out."""
    blocks = [block for block in text.split("\n\n") if block]
    return [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until `condition` holds; fail if it never does. The time is that of a machine under load."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield


class Composed:
    """A model that plays given events, as ensembles of texts do: reasoning, remote members, a trace."""

    max_model_len = None
    explains_tokens, fan_out = True, 1

    def __init__(self, name, *events):
        self.name, self.members, self.events = name, (name,), events

    async def generate(self, request):
        for event in self.events:
            await asyncio.sleep(0)
            yield event


def named_events_of(text: str) -> list[tuple[str, str]]:
    """(name, data) of each server-sent event of a protocol that names them."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), data.removeprefix("data: ")) for name, data in blocks]
