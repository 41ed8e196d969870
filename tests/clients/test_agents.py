"""Agents that people use, through a tool loop of two steps: the model calls, is told what came of it, and answers.

The model is scripted, the server and everything between them are real.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.tool_formats.formats import FORMATS
from ensemble_server.server.weights.view import Surface
from tests.clients.tool_loop import QUESTION, assert_was_a_loop, weather
from tests.server.api.conftest import live_server

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_langchains_agent(url: str, model: ScriptedModel, is_streamed: bool) -> None:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool("weather")
    def look_up(city: str) -> str:
        """The weather in a city."""
        return f"rainy in {city}"

    chat = ChatOpenAI(model="far", base_url=url, api_key="none", streaming=is_streamed)
    agent = create_agent(chat, [look_up])
    asked = {"messages": [{"role": "user", "content": QUESTION}]}
    if is_streamed:
        pieces = [message.content async for message, _ in agent.astream(asked, stream_mode="messages")]
        assert "".join(pieces).endswith("It will be rainy in Oslo.")
        assert len(pieces) > 4
    else:
        answer = await agent.ainvoke(asked)
        assert answer["messages"][-1].content == "It will be rainy in Oslo."
    assert_was_a_loop(model)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_pydantic_ais_agent(url: str, model: ScriptedModel, is_streamed: bool) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("far", provider=OpenAIProvider(base_url=url, api_key="none")))

    @agent.tool_plain(name="weather")
    def look_up(city: str) -> str:
        """The weather in a city."""
        return f"rainy in {city}"

    if is_streamed:
        # A text before a call would be taken for the final answer of a stream; events go through to the end.
        async with agent.iter(QUESTION) as run:
            async for node in run:
                if Agent.is_model_request_node(node):
                    async with node.stream(run.ctx) as stream:
                        assert [event async for event in stream]
        assert run.result is not None
        assert run.result.output == "It will be rainy in Oslo."
    else:
        assert (await agent.run(QUESTION)).output == "It will be rainy in Oslo."
    assert_was_a_loop(model)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_llm_with_tools(
    url: str, model: ScriptedModel, is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    import llm
    from llm.default_plugins.openai_models import Chat

    def weather(city: str) -> str:
        """The weather in a city."""
        return f"rainy in {city}"

    chat = Chat("far", model_name="far", api_base=url, can_stream=True, supports_tools=True)
    chain = chat.chain(QUESTION, tools=[llm.Tool.function(weather)], key="none", stream=is_streamed)
    text = await asyncio.to_thread(chain.text)
    assert text.endswith("It will be rainy in Oslo.")
    assert_was_a_loop(model)


@pytest.mark.parametrize("form", list(FORMATS))
async def test_the_official_client_goes_through_the_loop_in_every_format(
    form: str, surface: Surface, tmp_path: Path
) -> None:
    import openai

    from ensemble_server.ensembles.base import ToolCall

    written = FORMATS[form].written([ToolCall("weather", '{"city": "Oslo"}')])
    own = Surface(surface.tokenizer, chat_template=surface.chat_template, tool_format=form)
    script = Script(tuple(written[place : place + 3] for place in range(0, len(written), 3)))
    model = ScriptedModel(
        "far",
        lambda request, index: weather(request, index) if request.messages[-1]["role"] == "tool" else script,
        surface=own,
        max_model_len=4096,
    )
    hosting = ScriptedHosting({"far": model}, {"far": own}, tmp_path / "batches")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    messages: list = [{"role": "user", "content": QUESTION}]
    async with live_server(hosting) as address, openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        async with client.chat.completions.stream(model="far", messages=messages, tools=tools) as stream:
            first = (await stream.get_final_completion()).choices[0]
        assert first.finish_reason == "tool_calls"
        [call] = first.message.tool_calls
        messages += [
            first.message.model_dump(include={"role", "content", "tool_calls"}),
            {"role": "tool", "tool_call_id": call.id, "content": "rainy in Oslo"},
        ]
        second = await client.chat.completions.create(model="far", messages=messages, tools=tools)
    assert second.choices[0].message.content == "It will be rainy in Oslo."
    assert_was_a_loop(model)
