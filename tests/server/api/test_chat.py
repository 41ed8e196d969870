"""POST /v1/chat/completions: every answer and every chunk is what the `openai` package says it is."""

from __future__ import annotations

import orjson
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from ensemble_server.ensembles.base import Delta, Done, MemberUsage, PromptScored, Usage
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.requests import responses
from tests.server.api.conftest import CHAT, Composed, asgi_client, events_of

OURS = TypeAdapter(responses.ChatCompletion)


async def chat(hosting, **parameters):
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | parameters)
    assert response.status_code == 200, response.text
    OURS.validate_json(response.content)
    return ChatCompletion.model_validate_json(response.content, strict=True)


async def chunks(hosting, **parameters):
    """All chunks of a streamed chat; the stream must end with [DONE]."""
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True} | parameters)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = events_of(response.text)
    assert end == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]


USED = Usage(3, 4, {"a": MemberUsage(3, 2), "b": MemberUsage(6, 2, cost=0.25)})
DONE = Done(USED, method="exchange_of_thought", members=("a", "b", "c"), turnout=2, trace={"rounds": [1, 2]})


async def test_an_answer_is_a_chat_completion(host):
    answer = await chat(host())
    [choice] = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "hello"
    assert answer.system_fingerprint == "fp_hello"
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello world", "stop")
    assert choice.logprobs is None
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4


async def test_an_answer_cut_by_max_tokens_finishes_with_length(host):
    answer = await chat(host(), max_tokens=2)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"


async def test_an_empty_answer_has_empty_content(host):
    assert (await chat(host(mute=Script()))).choices[0].message.content == ""


async def test_each_choice_has_its_own_text(host):
    answer = await chat(host(m=lambda request, index: Script((f"choice {index}",))), n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (0, "choice 0"),
        (1, "choice 1"),
        (2, "choice 2"),
    ]


async def test_greedy_decoding_may_have_several_choices(host):
    assert len((await chat(host(), n=3, temperature=0)).choices) == 3


async def test_logprobs_are_those_of_the_model(host):
    answer = await chat(host(), logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [token.token for token in content] == ["Hel", "lo", " wor", "ld"]
    assert bytes(content[0].bytes) == b"Hel"
    assert content[0].logprob == pytest.approx(-0.6931471805599453, abs=0)
    assert [alternative.token for alternative in content[0].top_logprobs] == ["Hel", "Hel1"]
    assert not hasattr(content[0], "members")


async def test_logprobs_without_alternatives(host):
    answer = await chat(host(), logprobs=True)
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content)


async def test_explain_shows_each_members_view_of_each_token_and_turns_logprobs_on(host):
    answer = await chat(host(), ensemble={"explain": True})
    token = answer.choices[0].logprobs.content[0]
    assert token.members == {"hello": {"logprob": token.logprob, "weight": 1.0}}
    assert token.entropy == pytest.approx(0.6931471805599453)
    assert token.disagreement == 0


async def test_the_answer_says_who_gave_it(host):
    model = Composed("talk", Delta(0, "42", finish_reason="stop"), DONE)
    answer = await chat(host(talk=model))
    assert answer.ensemble == {
        "method": "exchange_of_thought",
        "members": ["a", "b", "c"],
        "turnout": 2,
        "usage": {
            "a": {"prompt_tokens": 3, "completion_tokens": 2},
            "b": {"prompt_tokens": 6, "completion_tokens": 2, "cost": 0.25},
        },
        "trace": {"rounds": [1, 2]},
    }
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)


async def test_how_an_answer_came_to_be_is_reasoning_content(host):
    model = Composed(
        "talk", Delta(0, reasoning="Round 1. "), Delta(0, "42", reasoning="Agreed.", finish_reason="stop"), DONE
    )
    answer = await chat(host(talk=model))
    assert answer.choices[0].message.reasoning_content == "Round 1. Agreed."
    assert answer.choices[0].message.content == "42"
    deltas = [chunk.choices[0].delta for chunk in await chunks(host(talk=model))]
    assert [getattr(delta, "reasoning_content", None) for delta in deltas] == [None, "Round 1. ", "Agreed.", None, None]
    assert "".join(delta.content or "" for delta in deltas) == "42"


async def test_what_stopped_an_answer_is_its_stop_reason(host):
    model = Composed("m", Delta(0, "a", finish_reason="stop", stop_reason="END"), DONE)
    assert (await chat(host(m=model))).choices[0].stop_reason == "END"
    assert (await chunks(host(m=model)))[-1].choices[0].stop_reason == "END"


async def test_token_ids_are_returned_on_request(host, surface):
    answer = await chat(host(), return_token_ids=True)
    assert answer.choices[0].token_ids == [surface.encode(piece)[0] for piece in ("Hel", "lo", " wor", "ld")]
    assert answer.prompt_token_ids == surface.render(CHAT["messages"])
    streamed = await chunks(host(), return_token_ids=True)
    ids = [token_id for chunk in streamed for token_id in getattr(chunk.choices[0], "token_ids", None) or []]
    assert ids == answer.choices[0].token_ids
    assert streamed[0].prompt_token_ids == answer.prompt_token_ids


async def test_prompt_logprobs_are_returned_on_request(host, surface):
    answer = await chat(host(), prompt_logprobs=1)
    first, second, *_ = answer.prompt_logprobs
    token_id = str(surface.render(CHAT["messages"])[1])
    assert first is None
    assert second[token_id]["rank"] == 1


async def test_developer_messages_and_text_parts_reach_the_template_as_plain_text(host):
    hosting = host()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(hosting, messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}])
    assert hosting.models["hello"].requests[0].messages == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one\ntwo"},
    )


async def test_a_conversation_with_tool_calls_is_read_back(host):
    hosting = host()
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    await chat(hosting, messages=messages)
    _, assistant, tool = hosting.models["hello"].requests[0].messages
    assert assistant == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "call_1"}


@pytest.mark.parametrize("arguments", ["[1]", "NaN", "{]", "[1, {", "x"])
async def test_tool_calls_with_arguments_that_are_no_json_object_are_refused(host, arguments):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    async with asgi_client(host()) as client:
        body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].tool_calls[0].function.arguments"


# --- streams -----------------------------------------------------------------------------------------------------


async def test_a_stream_has_the_role_first_then_deltas_then_the_finish_reason(host):
    streamed = await chunks(host())
    assert streamed[0].choices[0].delta.role == "assistant"
    assert streamed[0].choices[0].delta.content == ""
    assert [chunk.choices[0].finish_reason for chunk in streamed] == [None] * 5 + ["stop"]
    assert [chunk.choices[0].delta.content for chunk in streamed[1:]] == ["Hel", "lo", " wor", "ld", None]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in streamed}) == 1
    assert streamed[0].system_fingerprint == "fp_hello"


async def test_finish_reason_is_null_and_not_left_out_before_the_end(host):
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    for event in events_of(response.text)[:-1]:
        chunk = orjson.loads(event)
        assert "finish_reason" in chunk["choices"][0]
        assert "usage" not in chunk


@pytest.mark.parametrize("n", [1, 3])
async def test_streamed_text_equals_whole_text(host, n):
    hosting = host(m=lambda request, index: Script(("a", "b", "c", str(index)), delay_s=0.001 * (3 - index)))
    whole = await chat(hosting, n=n)
    texts = [""] * n
    for chunk in await chunks(hosting, n=n):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


async def test_each_streamed_choice_has_one_role_and_one_finish(host):
    streamed = await chunks(host(), n=3)
    roles = [chunk.choices[0].index for chunk in streamed if chunk.choices[0].delta.role]
    finishes = [chunk.choices[0].index for chunk in streamed if chunk.choices[0].finish_reason]
    assert sorted(roles) == sorted(finishes) == [0, 1, 2]


async def test_usage_comes_last_with_no_choices_if_asked_for(host):
    *before, last = await chunks(host(), stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in before)
    assert last.choices == []
    assert last.usage.completion_tokens == 4
    assert last.ensemble["members"] == ["hello"]
    assert not any(hasattr(chunk, "ensemble") for chunk in before)


async def test_the_finish_says_who_answered_where_no_usage_follows(host):
    *before, last = await chunks(host(), n=2)
    assert last.choices[0].finish_reason == "stop"
    assert last.ensemble["turnout"] == 1
    assert not any(hasattr(chunk, "ensemble") for chunk in before)


async def test_usage_so_far_is_on_every_chunk_if_asked_for(host):
    streamed = await chunks(host(), stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk.usage.completion_tokens for chunk in streamed] == [0, 1, 2, 3, 4, 4, 4]
    assert len({chunk.usage.prompt_tokens for chunk in streamed}) == 1


async def test_streamed_logprobs_equal_whole_logprobs(host):
    parameters = {"logprobs": True, "top_logprobs": 2, "ensemble": {"explain": True}}
    whole = await chat(host(), **parameters)
    tokens = [
        token
        for chunk in await chunks(host(), **parameters)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.model_dump() for token in tokens] == [
        token.model_dump() for token in whole.choices[0].logprobs.content
    ]


async def test_tokens_that_add_no_text_yet_are_chunks_only_if_somebody_asked_for_tokens(host):
    """A character of several tokens: its text comes with the last of them."""
    model = Composed(
        "m", PromptScored((1,)), Delta(0, "", (5,)), Delta(0, "é", (6,)), Delta(0, "", (), finish_reason="stop"), DONE
    )
    assert len(await chunks(host(m=model))) == 3  # role, é, finish
    assert len(await chunks(host(m=model), return_token_ids=True)) == 4


async def test_an_error_in_mid_stream_is_an_event_and_done_follows(host):
    hosting = host(m=Script(("a", "b", "c"), fails_at=2))
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    *before, failure, end = events_of(response.text)
    error = orjson.loads(failure)["error"]
    assert response.status_code == 200
    assert len(before) == 3
    assert error["code"] == "member_failed"
    assert "scripted to fail at token 2" in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert end == "[DONE]"
    assert hosting.models["m"].num_live == 0


async def test_an_unknown_exception_in_mid_stream_gives_nothing_away(host):
    async with asgi_client(host(m=Script(("a", "b"), fails_at=1, error=ValueError("the secret")))) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert "secret" not in response.text
    assert "server_error" in response.text
