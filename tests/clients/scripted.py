"""A server of scripted models, for clients of which the protocol is tested and not the models: what each says is known.

`mix` says "Hello world"; `thinker` thinks before it answers; `caller` calls `weather` and then tells what came of it;
`json` says an object; `dies` breaks off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, MemberUsage, PromptScored, Usage
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE
from tests.server.api.conftest import HELLO, live_server, tokenizer

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOLS = "{% if tools %}{{ tools | tojson }}<tool_call>...</tool_call>{% endif %}"


class Thinker:
    """Thinks, then answers."""

    name = "thinker"
    members = ("thinker",)
    max_model_len = None
    explains_tokens, fan_out = True, 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        yield PromptScored((1, 2, 3))
        yield Delta(0, reasoning="Nine ", token_ids=(1,))
        yield Delta(0, reasoning="times two.", token_ids=(2, 3))
        yield Delta(0, "18", token_ids=(4,), finish_reason="stop")
        yield Done(Usage(3, 4, {"thinker": MemberUsage(3, 4)}), method="scripted", members=("thinker",), turnout=1)


def _called(request: GenerationRequest, index: int) -> Script:
    last = (request.messages or ())[-1]
    if last["role"] == "tool":
        return Script(("It is ", last["content"], "."))
    return Script((CALL[:20], CALL[20:40], CALL[40:]))


@asynccontextmanager
async def scripted_server(folder: Path) -> AsyncIterator[str]:
    """Its address, without /v1."""
    surface = Surface(tokenizer(folder), chat_template=CHAT_TEMPLATE + TOOLS)
    scripts = {
        "mix": HELLO,
        "caller": _called,
        "json": Script(('{"city": ', '"Oslo"}')),
        "dies": Script(("a", "b", "c"), fails_at=2),
    }
    models = {name: ScriptedModel(name, script, surface=surface, max_model_len=512) for name, script in scripts.items()}
    surfaces = dict.fromkeys(models, surface)
    hosting = ScriptedHosting({**models, "thinker": Thinker()}, surfaces, folder / "batches")
    hosting.embedder.name = "all-MiniLM-L6-v2"
    async with live_server(hosting) as url:
        yield url


@contextmanager
def in_thread(folder: Path) -> Iterator[str]:
    """The server in a thread of its own, for clients that block."""
    loop = asyncio.new_event_loop()
    ready = loop.create_future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with scripted_server(folder) as url:
            ready.set_result(url)
            await stop.wait()

    async def address() -> str:
        return await ready

    thread = Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(address(), loop).result(timeout=60)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
