"""Tools over HTTP: through the template where it knows them, through a grammar where a call is forced."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ensemble_server.ensembles.base import NamedFunction, ToolCallDelta
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


async def test_where_no_format_is_known_auto_answers_in_text_and_says_so(host):
    hosting = host(m=Script(("I call ", "weather(Oslo)")))
    for is_streamed in (False, True):
        response = await post(hosting, tools=[WEATHER], stream=is_streamed)
        assert (response.status_code, response.headers["x-unread-tools"]) == (200, "m")
    choice = await answer(hosting, tools=[WEATHER], tool_choice="auto")
    assert (choice.message.content, choice.message.tool_calls) == ("I call weather(Oslo)", None)


async def test_forced_calls_and_known_formats_leave_the_header_out(host, surface, hermes):
    assert "x-unread-tools" not in (await post(host(m=CALLS, surface=hermes), tools=[WEATHER])).headers
    forced = await post(host(m=Script(("{}",))), tools=[WEATHER], tool_choice="required")
    assert "x-unread-tools" not in forced.headers


FAR = Script(
    ("Let me see.", ToolCallDelta(0, "weather", '{"ci', "call_far"), ToolCallDelta(0, None, 'ty": "Oslo"}')),
)


async def test_a_model_that_is_not_hosted_here_gets_the_tools_and_its_calls_come_back(host):
    hosting = host(far=ScriptedModel("far", FAR))
    hosting._surfaces = {}
    choice = await answer(hosting, tools=[WEATHER], parallel_tool_calls=False)
    [call] = choice.message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("call_far", "weather", '{"city": "Oslo"}')
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    [request] = hosting.models["far"].requests
    assert (len(request.tools), request.tool_choice, request.parallel_tool_calls) == (1, "auto", False)
    text, calls, ids, finish = await streamed(hosting, tools=[WEATHER])
    assert (text, calls) == ("Let me see.", [["weather", '{"city": "Oslo"}']])
    assert (ids, finish) == (["call_far"], "tool_calls")


async def test_a_forced_call_of_a_model_that_is_not_hosted_here_is_asked_of_it(host):
    hosting = host(far=ScriptedModel("far", FAR))
    hosting._surfaces = {}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        [call] = (await answer(hosting, tools=[WEATHER], tool_choice=choice)).message.tool_calls
        assert call.function.name == "weather"
    required, named = hosting.models["far"].requests
    assert (required.tool_choice, named.tool_choice) == ("required", NamedFunction("weather"))


async def test_arguments_stream_as_they_are_written(host, hermes):
    pieces = ('<tool_call>{"name": "weather", "arguments": {"city": "', "Os", "lo", '"}}</tool_call>')
    response = await post(host(m=Script(pieces), surface=hermes), tools=[WEATHER], stream=True)
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events_of(response.text)[:-1]]
    arguments = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if "tool_calls" in delta]
    assert arguments == ['{"city": "', "Os", "lo", '"}']


async def test_one_call_at_most_where_calls_may_not_be_parallel(host, hermes):
    two = Script(('<tool_call>{"name": "time"}</tool_call>', '<tool_call>{"name": "weather"}</tool_call>'))
    hosting = host(m=two, surface=hermes)
    assert len((await answer(hosting, tools=[TIME, WEATHER])).message.tool_calls) == 2
    assert len((await answer(hosting, tools=[TIME, WEATHER], parallel_tool_calls=False)).message.tool_calls) == 1


async def test_every_choice_has_calls_of_its_own(host, hermes):
    script = {0: Script(("No.",)), 1: Script(('<tool_call>{"name": "time"}</tool_call>',))}
    response = await post(host(m=lambda request, index: script[index], surface=hermes), tools=[TIME], n=2)
    first, second = ChatCompletion.model_validate_json(response.content, strict=True).choices
    assert (first.message.content, first.finish_reason) == ("No.", "stop")
    assert (second.message.tool_calls[0].function.name, second.finish_reason) == ("time", "tool_calls")


async def test_a_config_may_say_what_the_template_does_not(host, surface):
    knowing = Surface(surface.tokenizer, chat_template=HERMES, tool_format="off")
    response = await post(host(m=CALLS, surface=knowing), tools=[WEATHER])
    assert response.headers["x-unread-tools"] == "m"
    assert "<tool_call>" in response.json()["choices"][0]["message"]["content"]
