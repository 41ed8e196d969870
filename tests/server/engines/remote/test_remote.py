from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    GenerationRequest,
    Grammar,
    MemberUsage,
    Model,
    NamedFunction,
    Sampling,
    ToolCall,
    collect,
)
from ensemble_server.ensembles.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineError,
    EnsembleError,
    MemberError,
    UnsupportedError,
)
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.engines.remote.remote import RemoteChat
from tests.server.engines.remote.scripted_remote import Behaviour, Connection, ScriptedRemote

ASK = GenerationRequest(messages=({"role": "user", "content": "How many?"},))


def ask(**changes: Any) -> GenerationRequest:
    return GenerationRequest(messages=ASK.messages, **changes)


@pytest.fixture
async def remote_of() -> AsyncIterator[Callable[..., Any]]:
    """remote_of(behaviour, ..., config_key=value) -> a running server and the model that talks to it."""
    opened: list[tuple[RemoteChat, ScriptedRemote]] = []

    async def make(
        *behaviours: Behaviour, explains_tokens: bool | None = None, **config: Any
    ) -> tuple[RemoteChat, ScriptedRemote]:
        server = await ScriptedRemote(list(behaviours)).__aenter__()
        waits: list[float] = []

        async def sleep(wait_s: float) -> None:
            waits.append(wait_s)

        model = RemoteChat(
            "far",
            RemoteModel(url=server.url, **config),
            sleep=sleep,
            rng=random.Random(0),
            explains_tokens=explains_tokens,
        )
        model.waits = waits  # type: ignore[attr-defined]
        opened.append((model, server))
        return model, server

    yield make
    for model, server in opened:
        await model.aclose()
        await server.__aexit__()


def saying(*pieces: str, **changes: Any) -> Behaviour:
    async def behave(connection: Connection) -> None:
        await connection.say(*pieces, **changes)

    return behave


def refusing(status: int, body: Any, **headers: str) -> Behaviour:
    async def behave(connection: Connection) -> None:
        await connection.respond(status, body, **headers)

    return behave


def streaming(*events: Any) -> Behaviour:
    """Sends these events, and hangs up."""

    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        for event in events:
            await connection.event(event)

    return behave


def content(text: str, index: int = 0, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish_reason, **more}]}


# --- answers ------------------------------------------------------------------------------------------------------


async def test_an_answer_streams_and_adds_up(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(
        saying("Eigh", "teen"), model="there", prompt_price_per_million=10, completion_price_per_million=100
    )
    assert isinstance(model, Model)
    events = [event async for event in model.generate(ASK)]
    assert [event.text for event in events if isinstance(event, Delta)] == ["Eigh", "teen", ""]
    done = events[-1]
    assert isinstance(done, Done)
    assert done.usage.members == {"far": MemberUsage(7, 3, cost=0.00037)}  # 7 * 10 + 3 * 100 millionths
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.members, done.turnout) == (7, 3, ("far",), 1)
    (connection,) = server.connections
    assert connection.path == "/v1/chat/completions"
    assert connection.body["model"] == "there"
    assert "authorization" not in connection.headers


async def test_the_request_says_what_was_asked_and_nothing_else(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(saying("x"))
    await collect(model, ASK)
    assert server.connections[0].body == {
        "model": "far",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "How many?"}],
        "temperature": 1.0,
    }
    schema = {"type": "object"}
    sampling = Sampling(
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=7,
        stop=("a", "b"),
        logit_bias={5: -1.0},
        grammar=Grammar("json_schema", json.dumps(schema)),
    )
    await collect(model, ask(sampling=sampling))
    assert server.connections[1].body == server.connections[0].body | {
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 7,
        "stop": ["a", "b"],
        "logit_bias": {"5": -1.0},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    }


async def test_raw_prompts_go_to_the_completions_endpoint(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(
        streaming({"choices": [{"index": 0, "text": "lo", "finish_reason": "length"}]}, "[DONE]")
    )
    answer = await collect(model, GenerationRequest(prompt="hel"))
    assert (answer.text, answer.choices[0].finish_reason) == ("lo", "length")
    await collect(model, GenerationRequest(prompt=(1, 2)))
    assert [connection.path for connection in server.connections] == ["/v1/completions"] * 2
    assert [connection.body["prompt"] for connection in server.connections] == ["hel", [1, 2]]


async def test_several_choices_may_interleave(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(
        streaming(content("b", 1), content("a", 0, "stop"), content("c", 1, "length"), "[DONE]")
    )
    answer = await collect(model, ask(n=2))
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("a", "stop"), ("bc", "length")]
    assert server.connections[0].body["n"] == 2


async def test_reasoning_is_kept_apart_from_the_answer(remote_of: Callable[..., Any]) -> None:
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}
    model, _ = await remote_of(streaming(thought, content("18", finish_reason="stop"), "[DONE]"))
    answer = await collect(model, ASK)
    assert (answer.choices[0].reasoning, answer.text) == ("hm", "18")


async def test_thoughts_among_the_parts_of_a_content_are_kept_apart(remote_of: Callable[..., Any]) -> None:
    """As Mistral's reasoning models answer."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "is it "}, {"type": "text", "text": "99?"}]}
    parts: list[list[Any]] = [
        [thinking],
        [{"type": "text", "text": "1"}],
        ["8"],
        [{"type": "image_url", "image_url": {}}],
    ]
    events = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in parts]
    model, _ = await remote_of(streaming(*events, content("", finish_reason="stop"), "[DONE]"))
    answer = await collect(model, ASK)
    assert (answer.choices[0].reasoning, answer.text) == ("is it 99?", "18")


@pytest.mark.parametrize("nothing", ["", None])
async def test_a_reason_of_nothing_is_no_end(remote_of: Callable[..., Any], nothing: Any) -> None:
    pieces = [content("1"), content("8")]
    for one in pieces:
        one["choices"][0] |= {"finish_reason": nothing, "index": None}
    model, _ = await remote_of(streaming(*pieces, content("", finish_reason="stop"), "[DONE]"))
    assert (await collect(model, ASK)).text == "18"


async def test_effort_and_the_bound_of_thoughts_reach_the_remote_end(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(saying("18"))
    await collect(model, ask(reasoning_effort="low", max_reasoning_tokens=64))
    await collect(model, ASK)
    await collect(model, ask(reasoning_effort="low", thinks=False))
    told, untold, off = (connection.body for connection in server.connections)
    assert off["reasoning_effort"] == "none"
    assert (told["reasoning_effort"], told["thinking_token_budget"]) == ("low", 64)
    assert not {"reasoning_effort", "thinking_token_budget"} & untold.keys()


@pytest.mark.parametrize(("details", "num"), [({"reasoning_tokens": 5}, 5), (None, 0), ("many", 0), ({}, 0)])
async def test_tokens_of_thoughts_are_counted_as_the_remote_end_says(
    remote_of: Callable[..., Any], details: Any, num: int
) -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 9, "completion_tokens_details": details}
    model, _ = await remote_of(
        streaming(content("18", finish_reason="stop"), {"choices": [], "usage": usage}, "[DONE]")
    )
    done = (await collect(model, ASK)).done
    assert (done.usage.reasoning_tokens, done.usage.members["far"].reasoning_tokens) == (num, num)
    assert done.usage.completion_tokens == 9


def called(*pieces: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"tool_calls": list(pieces)}, "finish_reason": finish_reason}]}


def piece(
    index: int | None, name: str | None = None, arguments: str | None = "", id: str | None = None
) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    found = {"index": index, "id": id, "function": {key: value for key, value in function.items() if value is not None}}
    return {key: value for key, value in found.items() if value is not None}


TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)


async def test_tools_reach_the_remote_end_in_openais_words(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(saying("x"))
    forced = Sampling(grammar=Grammar("json_schema", "{}"))
    await collect(model, ask(tools=TOOLS, parallel_tool_calls=False))
    await collect(model, ask(tools=TOOLS, tool_choice="required", sampling=forced))
    await collect(model, ask(tools=TOOLS, tool_choice=NamedFunction("f"), sampling=forced))
    free, required, named = (connection.body for connection in server.connections)
    assert (free["tools"], free.get("tool_choice"), free["parallel_tool_calls"]) == (list(TOOLS), None, False)
    assert (required["tool_choice"], "response_format" in required) == ("required", False)
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "chunks",
    [
        [
            called(piece(0, "f", '{"x"', "call_1")),
            called(piece(0, None, ": 1}")),
            called(piece(1, "g", "{}", "call_2")),
        ],
        [called(piece(0, "f", '{"x": 1}', "call_1"), piece(1, "g", "{}", "call_2"))],
        [called(piece(0, "f", '{"x": 1}', "call_1")), called(piece(0, "g", "{}", "call_2"))],  # one place for all
        [called(piece(None, "f", '{"x": 1}', "call_1")), called(piece(None, "g", "{}", "call_2"))],
        [called(piece(3, "f", '{"x": 1', "call_1")), called(piece(5, "g", "{}", "call_2"), piece(3, None, "}"))],
    ],
)
async def test_streamed_calls_are_read_however_they_are_numbered(
    remote_of: Callable[..., Any], chunks: list[dict[str, Any]]
) -> None:
    model, _ = await remote_of(streaming(*chunks, called(finish_reason="tool_calls"), "[DONE]"))
    [choice] = (await collect(model, ask(tools=TOOLS))).choices
    assert choice.calls == [ToolCall("f", '{"x": 1}', "call_1"), ToolCall("g", "{}", "call_2")]
    assert (choice.text, choice.finish_reason) == ("", "stop")


async def test_whole_calls_are_read(remote_of: Callable[..., Any]) -> None:
    call = {"id": "no good id", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    choice = {"index": 0, "message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
    model, _ = await remote_of(refusing(200, {"choices": [choice]}))
    [choice] = (await collect(model, ask(tools=TOOLS))).choices
    assert choice.calls == [ToolCall("f", '{"x":1}', None)]


async def test_a_secret_in_a_call_is_blanked_wherever_it_is_cut(
    remote_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "s3cret-key")
    model, _ = await remote_of(
        streaming(
            called(piece(0, "f", '{"x": "s3cr', "1")),
            called(piece(0, None, 'et-key"}')),
            called(finish_reason="stop"),
            "[DONE]",
        ),
        api_key_env="FAR_KEY",
    )
    assert (await collect(model, ask(tools=TOOLS))).choices[0].calls == [ToolCall("f", '{"x": "***"}', "1")]


@pytest.mark.parametrize("pieces", [[piece(0, None, "{}")], [piece(place, "f", "{}") for place in range(129)]])
async def test_calls_that_make_no_sense_are_a_members_failure(
    remote_of: Callable[..., Any], pieces: list[dict[str, Any]]
) -> None:
    model, _ = await remote_of(streaming(called(*pieces), "[DONE]"))
    with pytest.raises(MemberError, match="malformed answer"):
        await collect(model, ask(tools=TOOLS))


async def test_a_character_that_two_chunks_share_is_whole(remote_of: Callable[..., Any]) -> None:
    model, _ = await remote_of(
        streaming(
            {"choices": [{"index": 0, "delta": {"reasoning": "so \ud83d"}}]},
            {"choices": [{"index": 0, "delta": {"reasoning": "\ude00."}}]},
            content("Hi \ud83d"),
            content("\ude00\ude00!"),
            content("\ud83d", finish_reason="stop"),
            "[DONE]",
        )
    )
    [choice] = (await collect(model, ASK)).choices
    assert choice.text == "Hi \U0001f600\ufffd!\ufffd"
    assert choice.reasoning == "so \U0001f600."


async def test_a_character_that_two_pieces_of_a_call_share_is_whole(remote_of: Callable[..., Any]) -> None:
    chunks = [called(piece(0, "f", '{"x": "\ud83d', "1")), called(piece(0, None, '\ude00"}'))]
    model, _ = await remote_of(streaming(*chunks, called(finish_reason="tool_calls"), "[DONE]"))
    [choice] = (await collect(model, ask(tools=TOOLS))).choices
    assert choice.calls == [ToolCall("f", '{"x": "\U0001f600"}', "1")]


async def test_half_a_character_costs_neither_an_answer_nor_a_reason(remote_of: Callable[..., Any]) -> None:
    tokens = [{"token": "a\ud83d", "logprob": -1.0, "top_logprobs": [{"token": "\ude00", "logprob": -2.0}]}]
    message = {"content": "a\ud83d", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "\ude00"}}}]}
    choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": tokens}}
    model, _ = await remote_of(
        refusing(200, {"choices": [choice]}),
        refusing(400, {"error": {"message": "no \ud83d"}}),
        streaming({"error": {"message": "no \ud83d"}}),
    )
    [said] = (await collect(model, ask(tools=TOOLS, top_logprobs=1))).choices
    assert (said.text, said.calls) == ("a\ufffd", [ToolCall("f", '{"x":"\ufffd"}')])
    assert [(token.text, token.top[0].text) for token in said.tokens] == [("a\ufffd", "\ufffd")]
    for _ in range(2):
        with pytest.raises(MemberError, match="no \ufffd"):
            await collect(model, ASK)


async def test_a_server_that_does_not_stream_is_understood(remote_of: Callable[..., Any]) -> None:
    choice = {"index": 0, "message": {"content": "18"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    model, _ = await remote_of(refusing(200, {"choices": [choice], "usage": usage}))
    answer = await collect(model, ASK)
    assert (answer.text, answer.done.usage.prompt_tokens) == ("18", 4)


@pytest.mark.parametrize(
    "kind", ["text/event-stream", "Text/Event-Stream; charset=utf-8", "application/json", "text/plain"]
)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_body_is_read_as_what_it_is_and_not_as_what_it_is_called(
    remote_of: Callable[..., Any], kind: str, is_stream: bool
) -> None:
    choice = {"index": 0, "message": {"content": "18"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    pieces = (b": hello\n", b"\ndata: ", body, b"\n\ndata: [DONE]\n\n") if is_stream else (body[:5], body[5:])
    model, _ = await remote_of(sending(f"200 OK\r\nContent-Type: {kind}", *pieces))
    assert (await collect(model, ASK)).text == "18"


async def test_logprobs_of_a_chat_are_mapped(remote_of: Callable[..., Any]) -> None:
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "é", "logprob": -0.5}]}
    model, server = await remote_of(
        streaming(content("é", logprobs={"content": [token]}, finish_reason="stop"), "[DONE]")
    )
    answer = await collect(model, ask(top_logprobs=1))
    (read,) = answer.choices[0].tokens
    assert (read.text, read.logprob, read.bytes, read.top[0].text) == ("é", -0.5, b"\xc3\xa9", "é")
    assert (server.connections[0].body["logprobs"], server.connections[0].body["top_logprobs"]) == (True, 1)


async def test_a_server_of_this_kind_takes_weights_and_explains(remote_of: Callable[..., Any]) -> None:
    views = {"base": {"logprob": -0.1, "weight": 0.75}, "code": {"logprob": -9999.0, "weight": 0.25}}
    chunk = content(
        "é", logprobs={"content": [{"token": "é", "logprob": -0.4, "members": views}]}, finish_reason="stop"
    )
    model, server = await remote_of(
        streaming(chunk | {"ensemble": {"trace": {"gates": {"a": 1}}}}, "[DONE]"), explains_tokens=True
    )
    asked = ask(overrides={"weights": {"base": 3}}, explain=True, top_logprobs=0)
    answer = await collect(model, asked)
    assert server.connections[0].body["ensemble"] == {"weights": {"base": 3}, "explain": True}
    members = answer.choices[0].tokens[0].members
    assert {name: (view.logprob, view.weight) for name, view in members.items()} == {
        "base": (-0.1, 0.75),
        "code": (-9999.0, 0.25),
    }
    assert answer.done.trace == {"gates": {"a": 1}}
    assert model.explains_tokens


@pytest.mark.parametrize("members", ["none", {"base": 1}, {"base": {"logprob": "much", "weight": 1}}])
async def test_members_that_mean_something_else_are_ignored(remote_of: Callable[..., Any], members: Any) -> None:
    token = {"token": "é", "logprob": -0.4, "members": members}
    model, _ = await remote_of(streaming(content("é", logprobs={"content": [token]}, finish_reason="stop"), "[DONE]"))
    answer = await collect(model, ask(top_logprobs=0))
    assert answer.choices[0].tokens[0].members is None


async def test_logprobs_of_a_completion_are_mapped(remote_of: Callable[..., Any]) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {"c": -2.0, "b": -1.5}]}
    choice = {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs}
    model, _ = await remote_of(streaming({"choices": [choice]}, "[DONE]"))
    answer = await collect(model, GenerationRequest(prompt="x", top_logprobs=2))
    first, second = answer.choices[0].tokens
    assert (first.logprob, second.logprob, [top.text for top in second.top]) == (None, -1.5, ["b", "c"])


async def test_logprobs_that_the_remote_end_leaves_out_are_refused_by_name(remote_of: Callable[..., Any]) -> None:
    model, _ = await remote_of(saying("18"))
    with pytest.raises(UnsupportedError, match=r"'far'.*no logprobs") as raised:
        await collect(model, ask(top_logprobs=0))
    assert raised.value.param == "logprobs"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask(prompt_logprobs=0), "prompt_logprobs"),
        (ask(overrides={"pool": "geometric"}), "ensemble.pool"),
        (ask(sampling=Sampling(grammar=Grammar("regex", "a"))), "structured_outputs"),
    ],
)
async def test_what_no_remote_api_takes_is_refused_before_asking(
    remote_of: Callable[..., Any], request_: GenerationRequest, param: str
) -> None:
    model, server = await remote_of(saying("x"))
    with pytest.raises(UnsupportedError) as raised:
        await collect(model, request_)
    assert raised.value.param == param
    assert not server.connections


# --- keys ---------------------------------------------------------------------------------------------------------


async def test_the_key_comes_from_the_environment(
    remote_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "s3cret")
    model, server = await remote_of(saying("x"), api_key_env="FAR_KEY")
    await collect(model, ASK)
    assert server.connections[0].headers["authorization"] == "Bearer s3cret"


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"'far'.*FAR_KEY"):
        RemoteChat("far", RemoteModel(url="http://127.0.0.1:1/v1", api_key_env="FAR_KEY"))


USER, PASSWORD, TOKEN, KEY = "robert", "hunter:2/x", "t0ken-of-url", "sk-abcdef123456"


def secret_url(address: str) -> str:
    """With a user, a password and a token, as some gateways want them."""
    return address.replace("http://", f"http://{USER}:{quote(PASSWORD, safe='')}@") + f"?token={TOKEN}&v=1"


async def test_a_url_with_parameters_and_a_user_is_honoured(remote_of: Callable[..., Any]) -> None:
    _, server = await remote_of(saying("18"))
    other = RemoteChat("far", RemoteModel(url=secret_url(server.url)))
    assert (await collect(other, ASK)).text == "18"
    await other.aclose()
    [connection] = server.connections
    assert connection.path == f"/v1/chat/completions?token={TOKEN}&v=1"
    expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert connection.headers["authorization"] == f"Basic {expected}"


@pytest.mark.parametrize("status", [401, 503, 400])
async def test_a_remote_end_that_repeats_our_key_in_an_error_is_blanked(
    remote_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    caplog.set_level("DEBUG")
    said = {"error": {"message": f"context length: the key {KEY} may not"}}
    model, _ = await remote_of(refusing(status, said), api_key_env="FAR_KEY", max_retries=1)
    with pytest.raises(EnsembleError, match=r"the key \*\*\* may not") as raised:
        await collect(model, ASK)
    assert KEY not in str(raised.value) and KEY not in caplog.text


async def test_a_remote_end_that_repeats_our_key_in_its_answer_is_blanked(
    remote_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    pieces = ("You sent ", KEY[:5], KEY[5:], f" and {KEY[:4]}")
    model, _ = await remote_of(saying(*pieces), api_key_env="FAR_KEY")
    assert (await collect(model, ASK)).text == f"You sent *** and {KEY[:4]}"


# --- what is too much -------------------------------------------------------------------------------------------


def sending(head: str, *pieces: bytes) -> Behaviour:
    async def behave(connection: Connection) -> None:
        await connection.send(f"HTTP/1.1 {head}\r\nConnection: close\r\n\r\n")
        for piece in pieces:
            await connection.send(piece)

    return behave


BOMB = gzip.compress(bytes(17 * 2**20), 1)


async def test_a_packed_answer_is_unpacked(remote_of: Callable[..., Any]) -> None:
    choice = {"index": 0, "message": {"content": "18"}, "finish_reason": "stop"}
    packed = gzip.compress(json.dumps({"choices": [choice]}).encode())
    model, server = await remote_of(
        sending("200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip", packed)
    )
    assert (await collect(model, ASK)).text == "18"
    assert server.connections[0].headers["accept-encoding"] == "identity"


async def test_a_packed_answer_of_several_parts_is_whole_and_ends_where_they_end(remote_of: Callable[..., Any]) -> None:
    choice = {"index": 0, "message": {"content": "18"}, "finish_reason": "stop"}
    said = json.dumps({"choices": [choice]}).encode()
    packed = gzip.compress(said[:20]) + gzip.compress(b"") + gzip.compress(said[20:]) + bytes(100)
    model, _ = await remote_of(sending("200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip", packed))
    assert (await collect(model, ASK)).text == "18"


@pytest.mark.parametrize(
    ("status", "max_bytes", "said"),
    [
        ("200 OK", "MAX_STREAM_BYTES", "malformed answer: it is longer than"),
        ("401 X", "MAX_ERROR_BYTES", "answered 401"),
    ],
)
async def test_packed_parts_without_content_and_without_end_are_left(
    remote_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, status: str, max_bytes: str, said: str
) -> None:
    monkeypatch.setattr(f"ensemble_server.server.engines.remote.remote.{max_bytes}", 1000)

    async def behave(connection: Connection) -> None:
        await connection.send(f"HTTP/1.1 {status}\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n")
        while not connection.gone.is_set():
            await connection.send(gzip.compress(b"") * 50)

    model, server = await remote_of(behave)
    with pytest.raises(MemberError, match=said):
        await collect(model, ASK)
    await server.connections[0].gone.wait()


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_an_answer_that_unpacks_without_end_is_left(remote_of: Callable[..., Any], kind: str) -> None:
    model, _ = await remote_of(sending(f"200 OK\r\nContent-Type: {kind}\r\nContent-Encoding: gzip", BOMB))
    with pytest.raises(MemberError, match=r"malformed answer: (it|one event) is longer than 16777216 bytes"):
        await collect(model, ASK)


async def test_an_error_that_unpacks_without_end_is_read_from_its_beginning(remote_of: Callable[..., Any]) -> None:
    text = gzip.compress(b"overloaded " + bytes(16 * 2**20), 1)
    model, _ = await remote_of(sending("401 X\r\nContent-Encoding: gzip", text))
    tracemalloc.start()
    with pytest.raises(MemberError, match="answered 401: overloaded"):
        await collect(model, ASK)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("Content-Encoding: br", "Content-Encoding 'br' was not asked for"),
        ("Content-Encoding: gzip", "cannot be unpacked"),
    ],
)
async def test_packing_that_is_unknown_or_broken_is_said(remote_of: Callable[..., Any], head: str, reason: str) -> None:
    model, _ = await remote_of(sending(f"200 OK\r\n{head}", b"no gzip"))
    with pytest.raises(MemberError, match=f"malformed answer: .*{reason}"):
        await collect(model, ASK)


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": 10**30, "completion_tokens": 3}, {"prompt_tokens": -1}, {"prompt_tokens": "x"}, [], "none", 7],
)
async def test_a_usage_that_cannot_be_does_not_cost_the_answer(remote_of: Callable[..., Any], usage: Any) -> None:
    model, _ = await remote_of(
        streaming(content("18", finish_reason="stop"), {"choices": [], "usage": usage}, "[DONE]")
    )
    answer = await collect(model, ASK)
    assert (answer.text, answer.done.usage.prompt_tokens) == ("18", 0)
    assert answer.done.usage.completion_tokens == (usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0)


# --- choices that do not come -----------------------------------------------------------------------------------


async def test_an_end_that_takes_no_notice_of_n_is_asked_again(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(saying("a"), saying("b"), saying("c"))
    answer = await collect(model, ask(n=3, sampling=Sampling(seed=7)))
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [(text, "stop") for text in "abc"]
    assert [connection.body.get("n") for connection in server.connections] == [3, 2, None]
    assert len({connection.body["seed"] for connection in server.connections}) == 3
    assert answer.done.usage.members == {"far": MemberUsage(21, 9)}


async def test_a_blank_choice_is_asked_for_again_and_the_others_are_kept(remote_of: Callable[..., Any]) -> None:
    first = streaming(content("a", 0, "stop"), content(" ", 1), content("", 1, "stop"), "[DONE]")
    model, server = await remote_of(first, saying("b"))
    answer = await collect(model, ask(n=2))
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert "n" not in server.connections[1].body


@pytest.mark.parametrize("second", [saying(""), refusing(401, "no more")], ids=["blank again", "refused"])
async def test_what_stays_blank_is_named_and_the_rest_is_kept(
    remote_of: Callable[..., Any], caplog: pytest.LogCaptureFixture, second: Behaviour
) -> None:
    model, server = await remote_of(streaming(content("a", 0, "stop"), content("", 1, "stop"), "[DONE]"), second)
    answer = await collect(model, ask(n=2, explain=True))
    assert [choice.text for choice in answer.choices] == ["a", ""]
    assert answer.choices[1].finish_reason == "stop"
    assert answer.done.trace == {"empty_choices": [1]}
    assert "choices [1] of 2 stayed empty" in caplog.text
    assert len(server.connections) == 2


# --- trying again -------------------------------------------------------------------------------------------------


async def test_a_failing_server_is_tried_again_and_then_answers(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(
        refusing(500, "oops"), refusing(429, {"error": {"message": "slow down"}}, Retry_After="3"), saying("18")
    )
    assert (await collect(model, ASK)).text == "18"
    assert len(server.connections) == 3
    own, asked = model.waits
    assert 0.25 <= own < 0.5
    assert asked == 3


async def test_after_the_last_try_the_reason_is_told(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(refusing(503, {"error": {"message": "overloaded"}}), max_retries=1)
    with pytest.raises(MemberError, match=r"member 'far': the remote end answered 503: overloaded \(after 2 tries\)"):
        await collect(model, ASK)
    assert len(server.connections) == 2


async def test_a_wait_beyond_the_deadline_or_the_timeout_is_not_begun(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(refusing(429, {"detail": "full"}, Retry_After="60"), timeout_s=90)
    with pytest.raises(MemberError, match="429: full"):
        await collect(model, ask(deadline_s=30))
    impatient, _ = await remote_of(refusing(429, {"detail": "full"}, Retry_After="60"), timeout_s=30)
    with pytest.raises(MemberError, match="429: full"):
        await collect(impatient, ASK)
    assert model.waits == impatient.waits == []
    assert len(server.connections) == 1


async def test_a_refused_request_is_not_repeated(remote_of: Callable[..., Any]) -> None:
    model, server = await remote_of(refusing(401, {"error": {"message": "wrong key", "code": "invalid_api_key"}}))
    with pytest.raises(MemberError, match="answered 401: wrong key"):
        await collect(model, ASK)
    assert len(server.connections) == 1


async def test_a_prompt_too_long_for_the_remote_end_is_the_requests_fault(remote_of: Callable[..., Any]) -> None:
    said = {"error": {"message": "This model's maximum context length is 8 tokens.", "code": 400}}
    model, _ = await remote_of(refusing(400, said))
    with pytest.raises(ContextLengthError, match=r"'far'.*maximum context length is 8"):
        await collect(model, ASK)


async def test_a_dead_address_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = RemoteChat("far", RemoteModel(url="http://127.0.0.1:9/v1", max_retries=0))
    with pytest.raises(MemberError, match=r"'far': cannot be reached \(ConnectError\)"):
        await collect(model, ASK)
    assert model.is_out_of_reach
    assert "cannot reach http://127.0.0.1:9/v1:" in caplog.text
    await model.aclose()


# --- breaking off -------------------------------------------------------------------------------------------------

GARBAGE = [
    pytest.param(streaming("{not json"), "malformed answer", id="no JSON"),
    pytest.param(streaming('{"choices": "none"}'), "malformed answer: choices", id="wrong type"),
    pytest.param(streaming("[1, 2]"), "malformed answer", id="no object"),
    pytest.param(streaming(content("x", 5)), "choice 5 was not asked for", id="choice out of range"),
    pytest.param(streaming("[DONE]"), "the answer is empty", id="nothing said"),
    pytest.param(streaming(content(" \n", finish_reason="stop"), "[DONE]"), "the answer is empty", id="blank"),
    pytest.param(streaming(content("18")), "the stream ended before the answer did", id="cut between events"),
    pytest.param(streaming(content("1"), {"error": {"message": "out of memory"}}), "out of memory", id="error event"),
    pytest.param(streaming(content("1", finish_reason="content_filter")), "content_filter", id="filtered"),
    pytest.param(refusing(200, "<html>hello</html>"), "malformed answer", id="a web page"),
    pytest.param(refusing(200, {"choices": []}), "the answer is empty", id="no choices"),
    pytest.param(refusing(302, ""), "answered 302", id="redirect"),
]


@pytest.mark.parametrize(("behaviour", "reason"), GARBAGE)
async def test_what_is_no_answer_is_an_error_with_its_reason(
    remote_of: Callable[..., Any], behaviour: Behaviour, reason: str
) -> None:
    model, _ = await remote_of(behaviour)
    with pytest.raises(MemberError, match=f"member 'far': .*{reason}"):
        await collect(model, ASK)


async def test_bytes_that_are_no_text_are_an_error(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        await connection.send(b"data: \xff\xfe\n\n")

    model, _ = await remote_of(behave)
    with pytest.raises(MemberError, match="malformed answer"):
        await collect(model, ASK)


async def test_hanging_up_mid_stream_is_an_error_after_the_text(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.send(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        event = f"data: {json.dumps(content('18'))}\n\n"
        await connection.send(f"{len(event):x}\r\n{event}\r\n")

    model, server = await remote_of(behave)
    seen = []
    with pytest.raises(MemberError, match="the connection broke off"):
        async for event in model.generate(ASK):
            seen.append(event)
    assert [event.text for event in seen] == ["18"]
    assert len(server.connections) == 1  # an answer that has begun is not begun again


async def test_a_server_that_stalls_is_left_even_if_it_sends_comments(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        await connection.event(content("1"))
        while not connection.gone.is_set():
            await connection.send(": still here\n\n")
            await asyncio.sleep(0.02)

    model, server = await remote_of(behave, timeout_s=0.2)
    with pytest.raises(MemberError, match=r"stalled: nothing came for timeout_s = 0.2 s"):
        await collect(model, ASK)
    await asyncio.wait_for(server.connections[0].gone.wait(), 2)


async def test_a_finished_answer_counts_even_if_its_stream_is_never_closed(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        await connection.event(content("18", finish_reason="stop"))
        await connection.gone.wait()

    model, _ = await remote_of(behave, timeout_s=1)
    assert (await collect(model, ASK)).text == "18"


async def test_a_server_that_never_responds_is_left(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.gone.wait()

    model, server = await remote_of(behave, timeout_s=0.1)
    with pytest.raises(MemberError, match=r"no response within timeout_s = 0.1 s"):
        await collect(model, ASK)
    assert len(server.connections) == 1


async def test_the_deadline_gives_what_is_there_or_an_error(remote_of: Callable[..., Any]) -> None:
    async def say_and_stall(connection: Connection) -> None:
        await connection.start_stream()
        await connection.event(content("eight"))
        await connection.gone.wait()

    async def stall(connection: Connection) -> None:
        await connection.start_stream()
        await connection.gone.wait()

    model, _ = await remote_of(say_and_stall, stall)
    answer = await collect(model, ask(deadline_s=0.2))
    assert (answer.text, answer.choices[0].finish_reason) == ("eight", "length")
    with pytest.raises(DeadlineError, match=r"0.1 s"):
        await collect(model, ask(deadline_s=0.1))


async def test_leaving_early_closes_the_connection(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        while not connection.gone.is_set():
            await connection.event(content("x"))
            await asyncio.sleep(0.01)

    model, server = await remote_of(behave, max_concurrency=1)
    async with aclosing(model.generate(ASK)) as events:
        async for _ in events:
            break
    await asyncio.wait_for(server.connections[0].gone.wait(), 2)

    task = asyncio.create_task(collect(model, ASK))  # the one slot is free again
    while len(server.connections) < 2:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.connections[1].gone.wait(), 2)


async def test_no_more_requests_run_at_once_than_allowed(remote_of: Callable[..., Any]) -> None:
    async def behave(connection: Connection) -> None:
        await asyncio.sleep(0.05)
        await connection.say("x")

    model, server = await remote_of(behave, max_concurrency=2)
    await asyncio.gather(*(collect(model, ASK) for _ in range(5)))
    assert (len(server.connections), server.max_live) == (5, 2)
    with pytest.raises(DeadlineError):  # waiting for a slot is part of the request's time
        await asyncio.gather(*(collect(model, ask(deadline_s=0.07)) for _ in range(5)))


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_from_a_remote_end_raise_anything_but_our_errors(raw: bytes, is_in_data: bool) -> None:
    async def behave(connection: Connection) -> None:
        await connection.start_stream()
        await connection.send(b"data: " + raw + b"\n\n" if is_in_data else raw)

    async def talk() -> None:
        async with ScriptedRemote([behave]) as server:
            model = RemoteChat("far", RemoteModel(url=server.url))
            with pytest.raises(EnsembleError):
                await collect(model, ASK)
            await model.aclose()

    asyncio.run(talk())
