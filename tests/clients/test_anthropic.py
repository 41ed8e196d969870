"""The official `anthropic` client: against real models on each engine, and against scripted ones."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from pydantic import BaseModel

from tests.clients.scripted import in_thread

MESSAGES = [{"role": "user", "content": "Hello there"}]
WEATHER = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Iterator[anthropic.Anthropic]:
    with (
        in_thread(tmp_path_factory.mktemp("scripted")) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("model", ["llama", "mix", "adaptive"])
def test_a_streamed_message_equals_the_whole_one(client, model):
    asked = {"model": model, "max_tokens": 24, "messages": MESSAGES, "extra_body": {"seed": 5}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 24)
    assert final.usage.input_tokens == whole.usage.input_tokens
    counted = client.messages.count_tokens(model=model, messages=MESSAGES)
    assert counted.input_tokens == whole.usage.input_tokens


def test_structured_output_parses_into_the_model(client):
    class Verdict(BaseModel):
        ok: bool

    parsed = client.messages.parse(model="mix", max_tokens=300, messages=MESSAGES, output_format=Verdict)
    assert isinstance(parsed.parsed_output, Verdict)


def test_members_are_explained_and_weighted_per_request(client, engine):
    if engine == "vllm":
        pytest.skip("vLLM does not show each member's view")
    ensemble = {"weights": {"deep": 1}, "explain": True}
    asked = {"messages": MESSAGES, "max_tokens": 4}
    greedy = {"temperature": 0}  # which this client has no name for any more
    answer = client.messages.create(model="mix", **asked, extra_body=greedy | {"ensemble": ensemble})
    [block] = answer.content
    assert block.logprobs[0]["logprob"] == pytest.approx(block.logprobs[0]["members"]["deep"]["logprob"])
    assert block.text == client.messages.create(model="deep", **asked, extra_body=greedy).content[0].text
    assert answer.ensemble["method"] == "probability_average"


def test_a_forced_call_is_made_by_any_model(client):
    called = client.messages.create(
        model="mix", max_tokens=300, messages=MESSAGES, tools=[WEATHER], tool_choice={"type": "any"}
    )
    assert (called.stop_reason, called.content[0].name, set(called.content[0].input)) == (
        *("tool_use", "weather"),
        {"city"},
    )


def test_a_tool_loop(scripted):
    messages = [{"role": "user", "content": "Weather in Oslo?"}]
    asked = {"model": "caller", "max_tokens": 100, "tools": [WEATHER]}
    with scripted.messages.stream(**asked, messages=messages) as stream:
        called = stream.get_final_message()
    [call] = [block for block in called.content if block.type == "tool_use"]
    assert (call.input, called.stop_reason) == ({"city": "Oslo"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert scripted.messages.create(**asked, messages=messages).content[0].text == "It is sunny."


def test_thoughts_are_thinking_blocks(scripted):
    with scripted.messages.stream(model="thinker", max_tokens=100, messages=MESSAGES) as stream:
        thoughts = [event.thinking for event in stream if event.type == "thinking"]
        final = stream.get_final_message()
    assert thoughts == ["Nine ", "times two."]
    assert [block.type for block in final.content] == ["thinking", "text"]
    again = [*MESSAGES, {"role": "assistant", "content": final.content}, MESSAGES[0]]
    assert scripted.messages.create(model="mix", max_tokens=100, messages=again).content[0].text == "Hello world"


def test_models_are_listed(scripted):
    assert "mix" in [model.id for model in scripted.models.list()]


def test_errors_are_the_clients_own_exceptions(scripted):
    asked = {"max_tokens": 100, "messages": MESSAGES}
    with pytest.raises(anthropic.NotFoundError, match="did you mean 'mix'") as caught:
        scripted.messages.create(model="mixx", **asked)
    assert caught.value.type == "not_found_error" and caught.value.request_id
    with pytest.raises(anthropic.BadRequestError) as caught:
        scripted.messages.create(model="mix", **asked, extra_body={"temperature": 9})
    assert caught.value.error_code == "invalid_value"
    with pytest.raises(anthropic.APIError, match="scripted to fail"):
        list(scripted.messages.create(model="dies", stream=True, **asked))
