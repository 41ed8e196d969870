"""POST /v1/responses: every response and every event is what the `openai` package says it is."""

from __future__ import annotations

import json

import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.requests.openai_responses.shapes import ResponseObject
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE
from tests.server.api.conftest import CALL, HELLO, THOUGHTFUL, Composed, asgi_client, named_events_of

OURS = TypeAdapter(ResponseObject)
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


async def post(hosting, **body):
    async with asgi_client(hosting) as client:
        return await client.post(PATH, json={"input": "Say hello."} | body)


async def respond(hosting, **body):
    response = await post(hosting, **body)
    assert response.status_code == 200, response.text
    OURS.validate_json(response.content)
    return Response.model_validate_json(response.content, strict=True)


async def events(hosting, **body):
    """The events of a stream, which are numbered and named, and the last of which has the whole response."""
    response = await post(hosting, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    named = named_events_of(response.text)
    read = [EVENT.validate_json(data, strict=True) for _, data in named]
    assert [event.type for event in read] == [name for name, _ in named]
    assert [event.sequence_number for event in read] == list(range(len(read)))
    return read


def asked(hosting, model="hello"):
    return hosting.models[model].requests[-1]


async def test_a_text_is_answered_by_a_message(host):
    response = await respond(host())
    assert response.output_text == "Hello world"
    assert (response.status, response.model, response.error) == ("completed", "hello", None)
    assert response.usage.output_tokens == 4
    assert response.usage.total_tokens == response.usage.input_tokens + 4
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert response.ensemble["members"] == ["hello"]


async def test_the_events_of_a_text_come_in_order_and_add_up_to_the_response(host):
    read = await events(host())
    assert [event.type.removeprefix("response.") for event in read] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert read[0].response.status == "in_progress" and read[0].response.output == []
    assert "".join(event.delta for event in read if event.type == "response.output_text.delta") == "Hello world"
    last = read[-1].response
    assert (last.output_text, last.status, last.id) == ("Hello world", "completed", read[0].response.id)
    assert last.usage.output_tokens == 4 and last.ensemble["method"] == "scripted"


async def test_an_answer_of_no_tokens_is_an_empty_message(host):
    assert (await respond(host(m=Script(())))).output_text == ""
    assert (await events(host(m=Script(()))))[-1].response.output[0].content[0].text == ""


async def test_what_max_output_tokens_cuts_off_is_incomplete(host):
    response = await respond(host(), max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output_text, response.output[0].status, response.max_output_tokens) == ("Hello", "incomplete", 2)
    assert (await events(host(), max_output_tokens=2))[-1].type == "response.incomplete"


async def test_items_become_a_conversation(host):
    hosting = host()
    items = [
        {"role": "developer", "content": "Be exact."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Sun"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "Why?"},
    ]
    await respond(hosting, input=items, instructions="You are a clerk.")
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    other = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert list(asked(hosting).messages) == [
        {"role": "system", "content": "You are a clerk.\n\nBe exact."},
        {"role": "user", "content": "Weather\n?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "c1", **call}, {"id": "c2", **other}]},
        {"role": "tool", "content": "Rain", "tool_call_id": "c1"},
        {"role": "tool", "content": "Sun", "tool_call_id": "c2"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]


async def test_settings_reach_the_model_under_openais_names_and_under_ours(host):
    hosting = host()
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    await respond(
        hosting,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["!"],
        max_output_tokens=5,
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        ensemble={"weights": {"hello": 1}, "explain": True},
    )
    request = asked(hosting)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (0.5, 0.9, 7)
    assert (request.sampling.max_tokens, request.sampling.stop) == (5, ("!",))
    assert request.sampling.grammar == Grammar("json_schema", json.dumps(schema))
    assert (request.overrides, request.explain) == ({"weights": {"hello": 1}}, True)


async def test_what_was_asked_is_in_the_response(host):
    response = await respond(
        host(),
        instructions="Be brief.",
        metadata={"a": "b"},
        temperature=0.5,
        reasoning={"summary": "auto"},
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        store=False,
    )
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert response.text.format.type == "json_object" and response.reasoning.summary == "auto"
    assert response.store is False


async def test_explained_tokens_are_the_logprobs_of_the_text(host):
    response = await respond(host(), ensemble={"explain": True})
    tokens = response.output[0].content[0].logprobs
    assert [token.token for token in tokens] == ["Hel", "lo", " wor", "ld"]
    assert all(token.members["hello"]["weight"] == 1 for token in tokens)
    deltas = [event for event in await events(host(), ensemble={"explain": True}) if event.type.endswith("text.delta")]
    assert [token.token for event in deltas for token in event.logprobs] == ["Hel", "lo", " wor", "ld"]


async def test_logprobs_are_asked_for_by_include(host):
    tokens = (await respond(host(), include=["message.output_text.logprobs"], top_logprobs=2)).output[0].content[0]
    assert [len(token.top_logprobs) for token in tokens.logprobs] == [2, 2, 2, 2]
    assert (await respond(host())).output[0].content[0].logprobs == []


async def test_thoughts_are_an_item_of_their_own(host):
    response = await respond(host(m=Composed("m", *THOUGHTFUL)))
    thought, message = response.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Nine times two.", [])
    assert message.content[0].text == "18"
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    assert response.ensemble["trace"] == {"rounds": [1]}
    kinds = [event.type.removeprefix("response.") for event in await events(host(m=Composed("m", *THOUGHTFUL)))]
    assert kinds[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]


async def test_a_summary_of_thoughts_is_the_thoughts(host):
    asked_for = {"reasoning": {"effort": "low", "summary": "auto"}}
    thought = (await respond(host(m=Composed("m", *THOUGHTFUL)), **asked_for)).output[0]
    assert ([part.text for part in thought.summary], thought.content) == (["Nine times two."], [])
    read = await events(host(m=Composed("m", *THOUGHTFUL)), **asked_for)
    deltas = [event.delta for event in read if event.type == "response.reasoning_summary_text.delta"]
    assert deltas == ["Nine ", "times two."]


async def test_effort_is_told_to_templates_that_know_it(host, surface):
    knows = Surface(surface.tokenizer, chat_template=CHAT_TEMPLATE + "{{ reasoning_effort }}{{ enable_thinking }}")
    hosting = host(m=HELLO, surface=knows)
    await respond(hosting, reasoning={"effort": "high"})
    on = {"enable_thinking": True, "thinking": True}
    assert asked(hosting, "m").told_template == {"reasoning_effort": "high", **on}
    await respond(hosting, reasoning={"effort": "none"}, chat_template_kwargs={"reasoning_effort": "x"})
    assert asked(hosting, "m").told_template == {"reasoning_effort": "x", **dict.fromkeys(on, False)}
    response = await post(host(), reasoning={"effort": "high"}, text={"verbosity": "low"})
    assert response.headers["x-ignored-parameters"] == "reasoning.effort, text.verbosity"


async def test_a_call_is_an_item_with_its_arguments(host, hermes):
    response = await respond(host(m=CALL, surface=hermes), tools=[WEATHER])
    message, call = response.output
    assert message.content[0].text == "Let me look."
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Oslo"}, "completed")
    assert call.call_id.startswith("call_") and call.id.startswith("fc_")
    assert response.tools[0].name == "weather"
    read = await events(host(m=CALL, surface=hermes), tools=[WEATHER])
    deltas = [event.delta for event in read if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in read if event.type == "response.function_call_arguments.done"]
    assert json.loads("".join(deltas)) == json.loads(done.arguments) == {"city": "Oslo"}
    assert read[-1].response.output[1].arguments == done.arguments


async def test_tools_are_chosen_as_openai_says_it(host):
    hosting = host(m=Script(('{"city": ', '"Oslo"}')))
    forced = await respond(hosting, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    assert (forced.output[0].name, forced.output[0].arguments) == ("weather", '{"city": "Oslo"}')
    assert forced.tool_choice.name == "weather"
    await respond(hosting, tools=[WEATHER], tool_choice="none")
    assert asked(hosting, "m").sampling.grammar is None
    time = {"type": "function", "name": "time", "parameters": None, "strict": None}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    await respond(hosting, tools=[WEATHER, time], tool_choice=allowed)
    assert [
        option["properties"]["name"]["const"]
        for option in json.loads(asked(hosting, "m").sampling.grammar.source)["anyOf"]
    ] == ["time"]


async def test_tools_that_openai_would_run_are_skipped_and_named(host):
    tools = [{"type": "web_search"}, {"type": "custom", "name": "shell"}]
    items = [
        {"role": "user", "content": "?"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
    ]
    response = await post(host(), tools=tools, input=items, tool_choice={"type": "web_search"})
    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"].split(", ") == [
        "input[1]:web_search_call",
        "input[2]:custom_tool_call_output",
        "tools[0]:web_search",
        "tools[1]:custom",
    ]
    assert response.json()["tools"] == []


async def test_a_stored_response_is_gone_on_from_without_its_instructions(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        first = (await client.post(PATH, json={"input": "One?", "instructions": "Be brief."})).json()
        second = await client.post(PATH, json={"input": "Two?", "previous_response_id": first["id"]})
        assert second.json()["previous_response_id"] == first["id"]
        third = await client.post(PATH, json={"input": "Three?", "previous_response_id": second.json()["id"]})
        assert third.status_code == 200
    assert [message["content"] for message in asked(hosting).messages] == [
        *("One?", "Hello world", "Two?", "Hello world", "Three?")
    ]


async def test_items_of_stored_responses_are_referred_to_by_their_ids(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        [item] = (await client.post(PATH, json={"input": "One?"})).json()["output"]
        items = [{"role": "user", "content": "One?"}, {"type": "item_reference", "id": item["id"]}]
        response = await client.post(PATH, json={"input": [*items, {"role": "user", "content": "Two?"}]})
        assert response.status_code == 200
        response = await client.post(PATH, json={"input": [{"id": "msg_nobody"}]})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert [message["content"] for message in asked(hosting).messages] == ["One?", "Hello world", "Two?"]


async def test_stored_responses_are_retrieved_and_deleted(host):
    async with asgi_client(host()) as client:
        made = (await client.post(PATH, json={"input": "One?"})).json()
        found = await client.get(f"{PATH}/{made['id']}")
        assert found.json() == made
        assert (await client.get(f"{PATH}/{made['id']}?stream=true")).status_code == 400
        deleted = await client.delete(f"{PATH}/{made['id']}")
        assert deleted.json() == {"id": made["id"], "object": "response", "deleted": True}
        for response in (await client.get(f"{PATH}/{made['id']}"), await client.delete(f"{PATH}/{made['id']}")):
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        gone = await client.post(PATH, json={"input": "Two?", "previous_response_id": made["id"]})
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "previous_response_id")


async def test_what_is_not_to_be_stored_is_not(host):
    for hosting, body in ((host(), {"store": False}), (host({"stored_responses_mb": 0}), {})):
        async with asgi_client(hosting) as client:
            made = (await client.post(PATH, json={"input": "One?"} | body)).json()
            assert made["store"] is False
            assert (await client.get(f"{PATH}/{made['id']}")).status_code == 404
    response = await post(host({"stored_responses_mb": 0}), previous_response_id="resp_1")
    assert response.status_code == 400 and "stored_responses_mb" in response.json()["error"]["message"]


async def test_a_stored_response_is_its_keys_own(host):
    async with asgi_client(host({"api_keys": ("a", "b")})) as client:
        mine, other = ({"authorization": f"Bearer {key}"} for key in "ab")
        made = (await client.post(PATH, json={"input": "One?"}, headers=mine)).json()
        assert (await client.get(f"{PATH}/{made['id']}", headers=mine)).status_code == 200
        assert (await client.get(f"{PATH}/{made['id']}", headers=other)).status_code == 404


async def test_a_stream_is_stored_before_its_last_event(host):
    async with asgi_client(host()) as client:
        text = (await client.post(PATH, json={"input": "One?", "stream": True})).text
        last = orjson.loads(named_events_of(text)[-1][1])["response"]
        assert (await client.get(f"{PATH}/{last['id']}")).json() == last


async def test_a_failure_in_the_middle_ends_the_stream_with_two_events(host):
    read = await events(host(m=Script(("a", "b", "c"), fails_at=2)))
    failed, error = read[-2:]
    assert (failed.type, failed.response.status, failed.response.error.code) == (
        *("response.failed", "failed"),
        "server_error",
    )
    assert (error.type, error.code) == ("error", "member_failed")
    assert error.error["message"] == error.message


async def test_a_failure_before_the_first_token_is_a_plain_answer(host):
    unread = ScriptedModel("m", Script(("a",), fails_at=0, error=MemberError("m", "broken")))
    response = await post(host(m=unread), stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "member_failed")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]}, "input[0].function"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"min_tokens": 5, "max_output_tokens": 4}, "min_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools[0].name"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"ensemble": {"explain": "yes"}}, "ensemble.explain"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_names_the_parameter(host, body, param):
    response = await post(host(), **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


async def test_what_is_too_long_is_told_in_the_words_of_this_api(host):
    response = await post(host(), model="nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    wrong = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    response = await post(host(), text={"format": wrong})
    assert response.json()["error"]["message"].startswith("text.format: the json schema cannot be used")


async def test_unknown_fields_are_tolerated(host):
    response = await post(host(), made_up=1, service_tier="auto", prompt_cache_key="x", safety_identifier="y")
    assert (response.status_code, response.headers["x-ignored-parameters"]) == (200, "made_up")
