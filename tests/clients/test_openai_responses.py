"""The official `openai` client's responses: against real models on each engine, and against scripted ones."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.scripted import in_thread

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    with (
        in_thread(tmp_path_factory.mktemp("scripted")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("model", ["llama", "mix", "adaptive"])
def test_a_response_says_what_a_chat_says_whole_and_streamed(client, model):
    asked = {"model": model, "max_output_tokens": 24}
    extra = {"seed": 5}
    whole = client.responses.create(**asked, input="Hello there", extra_body=extra)
    messages = [{"role": "user", "content": "Hello there"}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=24, seed=5)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 24)
    with client.responses.stream(**asked, input="Hello there", extra_body=extra) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text == whole.output_text
    assert (final.status, final.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert final.usage == whole.usage


def test_structured_output_parses_into_the_model(client):
    class Verdict(BaseModel):
        ok: bool
        kind: Literal["good", "bad"]

    parsed = client.responses.parse(model="mix", input="Hello", text_format=Verdict, max_output_tokens=300)
    assert isinstance(parsed.output_parsed, Verdict)


def test_members_are_explained_and_weighted_per_request(client, engine):
    if engine == "vllm":
        pytest.skip("vLLM does not show each member's view")
    ensemble = {"weights": {"deep": 1}, "explain": True}
    asked = {"input": "Hello there", "temperature": 0, "max_output_tokens": 4}
    answer = client.responses.create(model="mix", **asked, extra_body={"ensemble": ensemble})
    [token, *_] = answer.output[0].content[0].logprobs
    assert token.logprob == pytest.approx(token.members["deep"]["logprob"])
    assert answer.output_text == client.responses.create(model="deep", **asked).output_text
    assert answer.ensemble["method"] == "probability_average"


def test_a_forced_call_is_made_by_any_model(client):
    called = client.responses.create(
        model="mix", input="Weather?", tools=[WEATHER], tool_choice="required", max_output_tokens=300
    )
    assert called.output[0].name == "weather"
    assert json.loads(called.output[0].arguments)["city"] in ("Oslo", "Rome")


def test_a_conversation_goes_on_from_a_stored_response(client):
    asked = {"model": "mix", "max_output_tokens": 8, "temperature": 0}
    first = client.responses.create(**asked, input="One?")
    second = client.responses.create(**asked, input="Two?", previous_response_id=first.id)
    sent = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two?"},
    ]
    whole = client.responses.create(**asked, input=sent, store=False)
    assert (second.output_text, second.usage) == (whole.output_text, whole.usage)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked, input="Two?", previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)


def test_a_tool_loop(scripted):
    items = [{"role": "user", "content": "Weather in Oslo?"}]
    called = scripted.responses.create(model="caller", input=items, tools=[WEATHER])
    [call] = [item for item in called.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Oslo"}
    items += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert scripted.responses.create(model="caller", input=items, tools=[WEATHER]).output_text == "It is sunny."


def test_thoughts_stream_before_the_answer(scripted):
    with scripted.responses.stream(model="thinker", input="9 * 2?") as stream:
        deltas = [(event.type, event.delta) for event in stream if event.type.endswith(".delta")]
        final = stream.get_final_response()
    assert deltas == [
        ("response.reasoning_text.delta", "Nine "),
        ("response.reasoning_text.delta", "times two."),
        ("response.output_text.delta", "18"),
    ]
    assert final.usage.output_tokens_details.reasoning_tokens == 3


def test_a_stream_that_breaks_off_raises(scripted):
    with pytest.raises(openai.APIError, match="scripted to fail"):
        list(scripted.responses.create(model="dies", input="?", stream=True))
