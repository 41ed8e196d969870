"""Tools over HTTP: through the template where it knows them, through a grammar where a call is forced."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.requests.messages import FunctionDefinition
from ensemble_server.server.requests.tool_use import tool_definition
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE
from tests.server.api.conftest import CHAT, asgi_client, events_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
HERMES = CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}<tool_call>...</tool_call>{% endif %}"
CALLS = Script(("Let me look.", "\n<tool", '_call>{"name": "weather", "argu', 'ments": {"city": "Oslo"}}</tool_call>'))


@pytest.fixture
def hermes(surface):
    return Surface(surface.tokenizer, chat_template=HERMES)


async def post(hosting, **parameters):
    async with asgi_client(hosting) as client:
        return await client.post("/v1/chat/completions", json=CHAT | parameters)


async def answer(hosting, **parameters):
    response = await post(hosting, **parameters)
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate_json(response.content, strict=True).choices[0]


async def streamed(hosting, **parameters):
    """(text, calls as [name, arguments], ids, finish_reason), put together as clients do."""
    response = await post(hosting, **parameters, stream=True)
    assert response.status_code == 200, response.text
    text, calls, ids, finish = "", {}, [], None
    for event in events_of(response.text)[:-1]:
        choice = ChatCompletionChunk.model_validate_json(event, strict=True).choices[0]
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or []:
            if call.id:
                ids.append(call.id)
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    return text, list(calls.values()), ids, finish


async def test_a_models_call_becomes_a_tool_call(host, hermes):
    choice = await answer(host(m=CALLS, surface=hermes), tools=[WEATHER])
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city": "Oslo"}')
    assert call.id.startswith("call_")
    assert choice.message.content == "Let me look."
    assert choice.finish_reason == "tool_calls"


async def test_a_streamed_call_is_the_same_call(host, hermes):
    text, calls, ids, finish = await streamed(host(m=CALLS, surface=hermes), tools=[WEATHER])
    assert (text, calls, len(ids), finish) == ("Let me look.", [["weather", '{"city": "Oslo"}']], 1, "tool_calls")


async def test_content_is_null_where_there_is_only_a_call(host, hermes):
    script = Script(('<tool_call>{"name": "time"}</tool_call>',))
    assert (await answer(host(m=script, surface=hermes), tools=[TIME])).message.content is None


async def test_an_answer_without_a_call_stays_text(host, hermes):
    choice = await answer(host(m=Script(("I ", "know.")), surface=hermes), tools=[WEATHER])
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("I know.", None, "stop")


async def test_the_template_sees_the_tools(host, hermes):
    hosting = host(m=CALLS, surface=hermes)
    await answer(hosting, tools=[WEATHER, TIME])
    [request] = hosting.models["m"].requests
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "time"]
    assert request.tools[0]["function"]["parameters"] == WEATHER["function"]["parameters"]
    assert request.sampling.grammar is None


def test_a_null_inside_a_schema_is_kept():
    parameters = {"type": "object", "properties": {"x": {"default": None}}}
    assert tool_definition(FunctionDefinition(name="f", parameters=parameters))["function"]["parameters"] == parameters


async def test_tool_choice_none_keeps_the_tools_from_the_model(host, surface):
    hosting = host(m=CALLS, surface=surface)
    choice = await answer(hosting, tools=[WEATHER], tool_choice="none")
    assert choice.message.tool_calls is None
    assert hosting.models["m"].requests[0].tools == ()


@pytest.mark.parametrize("template", ["plain", "hermes"])
async def test_a_named_function_is_forced_by_the_schema_of_its_arguments(host, surface, hermes, template):
    hosting = host(m=Script(('{"city"', ': "Oslo"}')), surface=hermes if template == "hermes" else surface)
    named = {"type": "function", "function": {"name": "weather"}}
    choice = await answer(hosting, tools=[TIME, WEATHER], tool_choice=named)
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, choice.message.content) == (
        "weather",
        '{"city": "Oslo"}',
        None,
    )
    assert choice.finish_reason == "tool_calls"
    grammar = hosting.models["m"].requests[0].sampling.grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.source) == WEATHER["function"]["parameters"]
    text, calls, ids, finish = await streamed(hosting, tools=[WEATHER], tool_choice=named)
    assert (text, calls, len(ids), finish) == ("", [["weather", '{"city": "Oslo"}']], 1, "tool_calls")


async def test_required_forces_a_call_of_any_of_the_functions(host, surface):
    hosting = host(m=Script(('{"name": "time",', ' "arguments": {}}')), surface=surface)
    choice = await answer(hosting, tools=[WEATHER, TIME], tool_choice="required")
    assert [call.function.name for call in choice.message.tool_calls] == ["time"]
    assert choice.finish_reason == "tool_calls"
    names = [
        option["properties"]["name"]["const"]
        for option in json.loads(hosting.models["m"].requests[0].sampling.grammar.source)["anyOf"]
    ]
    assert names == ["weather", "time"]


async def test_a_forced_call_that_is_cut_finishes_with_length(host, surface):
    hosting = host(m=Script(('{"city": ', '"Oslo"}')), surface=surface)
    named = {"type": "function", "function": {"name": "weather"}}
    choice = await answer(hosting, tools=[WEATHER], tool_choice=named, max_tokens=1)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city": '


async def test_mistrals_marker_is_kept_though_it_is_a_special_token(host, surface):
    mistral = Surface(surface.tokenizer, chat_template=CHAT_TEMPLATE + "{% if tools %}[TOOL_CALLS]{% endif %}")
    hosting = host(m=Script(('[TOOL_CALLS] [{"name": "time", "arguments": {}}]',)), surface=mistral)
    assert (await answer(hosting, tools=[TIME])).message.tool_calls[0].function.name == "time"
    await answer(hosting)
    with_tools, without = hosting.models["m"].requests
    assert (with_tools.sampling.skip_special_tokens, without.sampling.skip_special_tokens) == (False, True)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),  # a template that knows no tools, and no call is forced
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(host, parameters, param):
    response = await post(host(), **parameters)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_tool_choice_none_without_tools_is_fine(host):
    assert (await post(host(), tool_choice="none")).status_code == 200


async def test_tools_of_a_model_that_is_not_hosted_here_are_refused(host):
    hosting = host(far=ScriptedModel("far", Script(("!",))))
    hosting._surfaces = {}
    response = await post(hosting, tools=[WEATHER])
    assert response.status_code == 400
    assert "not hosted here" in response.json()["error"]["message"]
