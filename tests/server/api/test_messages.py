"""POST /v1/messages: every message and every event is what the `anthropic` package says it is."""

from __future__ import annotations

import json
from base64 import b64decode
from hashlib import sha256

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from ensemble_server.ensembles.base import Delta, Grammar
from ensemble_server.ensembles.errors import OverloadedError
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.requests.anthropic_messages.shapes import MessageObject
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE
from tests.server.api.conftest import CALL, DONE, HELLO, THOUGHTFUL, Composed, asgi_client, named_events_of

OURS = TypeAdapter(MessageObject)
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
ASKED = {"max_tokens": 100, "messages": [{"role": "user", "content": "Say hello."}]}
WEATHER = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def post(hosting, path="/v1/messages", **body):
    async with asgi_client(hosting) as client:
        return await client.post(path, json=ASKED | body)


async def message(hosting, **body):
    response = await post(hosting, **body)
    assert response.status_code == 200, response.text
    OURS.validate_json(response.content)
    return Message.model_validate_json(response.content, strict=True)


async def events(hosting, **body):
    response = await post(hosting, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    named = named_events_of(response.text)
    read = [EVENT.validate_json(data, strict=True) for _, data in named]
    assert [event.type for event in read] == [name for name, _ in named]
    return read


def asked(hosting, model="hello"):
    return hosting.models[model].requests[-1]


async def test_a_conversation_is_answered_by_blocks(host):
    answer = await message(host())
    [block] = answer.content
    assert (block.type, block.text) == ("text", "Hello world")
    assert (answer.stop_reason, answer.stop_sequence, answer.model) == ("end_turn", None, "hello")
    assert answer.usage.output_tokens == 4 and answer.usage.input_tokens > 0
    assert answer.ensemble["members"] == ["hello"]


async def test_the_events_of_a_text_come_in_order(host):
    read = await events(host())
    assert [event.type for event in read] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, ending = read[0].message, read[-2]
    assert (start.content, start.stop_reason, start.usage.output_tokens) == ([], None, 0)
    assert start.usage.input_tokens == ending.usage.input_tokens > 0
    assert "".join(event.delta.text for event in read[2:6]) == "Hello world"
    assert (ending.delta.stop_reason, ending.usage.output_tokens) == ("end_turn", 4)
    assert ending.ensemble["method"] == "scripted"


async def test_an_answer_of_no_tokens_has_no_blocks(host):
    assert (await message(host(m=Script(())))).content == []
    assert [event.type for event in await events(host(m=Script(())))] == [
        *("message_start", "message_delta", "message_stop")
    ]


async def test_why_an_answer_ended_is_its_stop_reason(host):
    assert (await message(host(), max_tokens=2)).stop_reason == "max_tokens"
    stopped = Composed("m", Delta(0, "a", finish_reason="stop", stop_reason="END"), DONE)
    answer = await message(host(m=stopped), stop_sequences=["END"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")
    assert (await events(host(m=stopped), stop_sequences=["END"]))[-2].delta.stop_sequence == "END"


async def test_blocks_become_a_conversation(host):
    hosting = host()
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, document]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Go on."},
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Rain"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no city", "is_error": True},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Be exact.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "B"},
    ]
    await message(hosting, messages=messages, system=system)
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for name, arguments in (("c1", '{"city": "Oslo"}'), ("c2", "{}"))
    ]
    assert list(asked(hosting).messages) == [
        {"role": "system", "content": "Be exact.\n\nB"},
        {"role": "user", "content": "Weather?\nT\nD"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "Rain", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: no city", "tool_call_id": "c2"},
        {"role": "user", "content": "Go on."},
    ]


async def test_settings_reach_the_model_under_anthropics_names_and_under_ours(host):
    hosting = host()
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    await message(
        hosting,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        stop_sequences=["!"],
        output_config={"format": {"type": "json_schema", "schema": schema}},
        ensemble={"weights": {"hello": 1}, "explain": True},
    )
    request = asked(hosting)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 7)
    assert (request.sampling.max_tokens, request.sampling.stop, request.sampling.seed) == (5, ("!",), 3)
    assert request.sampling.grammar == Grammar("json_schema", json.dumps(schema))
    assert (request.overrides, request.explain) == ({"weights": {"hello": 1}}, True)


async def test_explained_tokens_are_with_the_text(host):
    [block] = (await message(host(), ensemble={"explain": True})).content
    assert [token["token"] for token in block.logprobs] == ["Hel", "lo", " wor", "ld"]
    assert block.logprobs[0]["members"]["hello"]["weight"] == 1
    deltas = [event.delta for event in await events(host(), ensemble={"explain": True}) if hasattr(event, "delta")][:-1]
    assert [token["token"] for delta in deltas for token in delta.logprobs] == ["Hel", "lo", " wor", "ld"]


async def test_thoughts_are_a_block_of_their_own(host):
    thought, text = (await message(host(m=Composed("m", *THOUGHTFUL)))).content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Nine times two.", "18")
    assert b64decode(thought.signature) == sha256(b"Nine times two.").digest()
    read = await events(host(m=Composed("m", *THOUGHTFUL)))
    deltas = [event.delta for event in read if event.type == "content_block_delta"]
    assert [delta.type for delta in deltas] == [*["thinking_delta"] * 2, "signature_delta", "text_delta"]
    assert deltas[2].signature == thought.signature
    assert read[-2].usage.output_tokens_details.thinking_tokens == 3
    assert read[-2].ensemble["trace"] == {"rounds": [1]}


async def test_thinking_is_told_to_templates_that_know_it(host, surface):
    knows = Surface(surface.tokenizer, chat_template=CHAT_TEMPLATE + "{{ enable_thinking }}")
    hosting = host(m=HELLO, surface=knows)
    for thinking, told in (
        ({"type": "enabled", "budget_tokens": 2000}, {"enable_thinking": True, "thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
        ({"type": "adaptive"}, {}),
    ):
        await message(hosting, thinking=thinking)
        assert asked(hosting, "m").told_template == told
        assert asked(hosting, "m").max_reasoning_tokens == thinking.get("budget_tokens")
    response = await post(host(), thinking={"type": "enabled", "budget_tokens": 2000}, output_config={"effort": "low"})
    assert response.headers["x-ignored-parameters"] == "thinking, output_config.effort"


async def test_a_call_is_a_block_with_its_input(host, hermes):
    answer = await message(host(m=CALL, surface=hermes), tools=[WEATHER])
    text, call = answer.content
    assert text.text == "Let me look."
    assert (call.type, call.name, call.input, answer.stop_reason) == (
        "tool_use",
        "weather",
        {"city": "Oslo"},
        "tool_use",
    )
    read = await events(host(m=CALL, surface=hermes), tools=[WEATHER])
    pieces = [event.delta.partial_json for event in read if event.type == "content_block_delta" and event.index == 1]
    assert json.loads("".join(pieces)) == {"city": "Oslo"}
    [start] = [event.content_block for event in read if event.type == "content_block_start" and event.index == 1]
    assert (start.input, start.name) == ({}, "weather")


async def test_tools_are_chosen_as_anthropic_says_it(host):
    hosting = host(m=Script(('{"city": ', '"Oslo"}')))
    answer = await message(hosting, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    assert (answer.content[0].input, answer.stop_reason) == ({"city": "Oslo"}, "tool_use")
    await message(hosting, tools=[WEATHER], tool_choice={"type": "none"})
    assert asked(hosting, "m").sampling.grammar is None
    await message(hosting, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert asked(hosting, "m").sampling.grammar is not None


async def test_a_call_that_was_cut_off_has_what_is_there(host):
    hosting = host(m=Script(('{"city": "Os', 'lo"}')))
    answer = await message(hosting, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"}, max_tokens=1)
    assert (answer.content[0].input, answer.stop_reason) == ({"city": "Os"}, "max_tokens")


async def test_tools_that_anthropic_would_run_are_skipped_and_named(host):
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
    response = await post(host(), tools=tools, tool_choice={"type": "auto"})
    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == ("tools[0]:web_search_20250305, tools[1]:bash_20250124")


async def test_tokens_are_counted_as_the_model_reads_them(host, hermes):
    for body in ({}, {"system": "Be brief."}, {"tools": [WEATHER]}):
        hosting = host(m=HELLO, surface=hermes)
        count = await post(hosting, "/v1/messages/count_tokens", **body)
        assert count.status_code == 200, count.text
        assert count.json() == {"input_tokens": (await message(hosting, **body)).usage.input_tokens}
    hosting = host(far=ScriptedModel("far", HELLO))
    hosting._surfaces = {}
    refused = await post(hosting, "/v1/messages/count_tokens")
    assert refused.status_code == 400 and "not hosted here" in refused.json()["error"]["message"]


async def test_keys_are_read_from_x_api_key(host):
    async with asgi_client(host({"api_keys": ("key",)})) as client:
        assert (await client.post("/v1/messages", json=ASKED, headers={"x-api-key": "key"})).status_code == 200
        refused = await client.post("/v1/messages", json=ASKED, headers={"x-api-key": "other"})
        assert refused.status_code == 401
        assert refused.json()["type"] == "error"
        assert refused.json()["error"]["type"] == "authentication_error"
        assert (await client.head("/")).status_code == 200


async def test_errors_have_anthropics_shape(host):
    full = ScriptedModel("m", Script(("a",), fails_at=0, error=OverloadedError("the queue is full")))
    broken = ScriptedModel("m", Script(("a",), fails_at=0, error=RuntimeError("secret")))
    for hosting, body, status, kind in (
        (host(), {"temperature": 9}, 400, "invalid_request_error"),
        (host(), {"model": "nobody"}, 404, "not_found_error"),
        (host(m=full), {}, 429, "rate_limit_error"),
        (host(m=broken), {}, 500, "api_error"),
    ):
        response = await post(hosting, **body)
        assert response.status_code == status
        error = response.json()["error"]
        assert (response.json()["type"], error["type"]) == ("error", kind)
        assert "secret" not in error["message"]
        assert response.headers["request-id"] == response.headers["x-request-id"]
    assert (await post(host(), temperature=9)).json()["error"]["details"] == {
        "error_code": "invalid_value",
        "param": "temperature",
    }
    assert "retry-after" in (await post(host(m=full))).headers
    async with asgi_client(host()) as client:
        assert (await client.get("/v1/messages")).json()["error"]["type"] == "invalid_request_error"


async def test_a_failure_in_the_middle_is_an_error_event(host):
    response = await post(host(m=Script(("a", "b", "c"), fails_at=2)), stream=True)
    name, data = named_events_of(response.text)[-1]
    assert name == "error"
    assert json.loads(data)["error"]["type"] == "api_error"
    assert json.loads(data)["error"]["details"]["error_code"] == "member_failed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"messages": [*ASKED["messages"], {"role": "assistant", "content": "The answer is"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "messages[0].content",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "output_config.format"),
        ({"ensemble": {"explain": "yes"}}, "ensemble.explain"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_names_the_parameter(host, body, param):
    response = await post(host(), **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["details"]["param"].startswith(param)


async def test_unknown_fields_are_tolerated(host):
    known = {"metadata": {"user_id": "x"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}
    response = await post(host(), made_up=1, context_management={}, **known)
    assert (response.status_code, response.headers["x-ignored-parameters"]) == (200, "made_up")


async def test_a_beta_query_changes_nothing(host):
    assert (await post(host(), "/v1/messages?beta=true")).status_code == 200
