"""The official `openai` client against the live server, on each engine."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()][:5] == ["llama", "deep", "red", "mix", "adaptive"]
    assert client.models.retrieve("mix").max_model_len == 512


@pytest.mark.parametrize("model", ["llama", "mix", "adaptive"])
def test_a_streamed_answer_equals_the_whole_one(client, model):
    settings = {"model": model, "messages": MESSAGES, "max_tokens": 24, "seed": 5}
    whole = client.chat.completions.create(**settings)
    ChatCompletion.model_validate(whole.model_dump())
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"


async def test_many_async_clients_get_their_own_answers(live):
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

        async def ask(seed: int) -> str:
            answer = await client.chat.completions.create(model="mix", messages=MESSAGES, max_tokens=12, seed=seed)
            return answer.choices[0].message.content

        together = await asyncio.gather(*(ask(seed) for seed in range(12)))
        assert together[7] == await ask(7)
        assert len(set(together)) == 12


def test_structured_output_parses_into_the_model(client):
    class Verdict(BaseModel):
        ok: bool
        kind: Literal["good", "bad"]

    parsed = client.chat.completions.parse(
        model="mix", messages=MESSAGES, response_format=Verdict, seed=1, max_completion_tokens=300
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


def test_members_are_explained_and_weighted_per_request(client, engine):
    if engine == "vllm":
        pytest.skip("vLLM does not show each member's view; tests/server/api/test_hosted_models.py has its refusal")

    def first_token(ensemble: dict):
        answer = client.chat.completions.create(
            model="mix",
            messages=MESSAGES,
            max_tokens=1,
            temperature=0,
            extra_body={"ensemble": ensemble | {"explain": True}},
        )
        return answer, answer.choices[0].logprobs.content[0]

    answer, token = first_token({})
    assert set(token.members) == {"llama", "deep", "red"}
    assert answer.ensemble["members"] == ["llama", "deep", "red"]
    alone, token = first_token({"weights": {"deep": 1}})
    assert token.logprob == pytest.approx(token.members["deep"]["logprob"])
    single = client.chat.completions.create(model="deep", messages=MESSAGES, max_tokens=1, temperature=0)
    assert alone.choices[0].message.content == single.choices[0].message.content


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="did you mean 'mix'"):
        client.chat.completions.create(model="mixx", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="mix", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.chat.completions.create(model="mix", messages=[{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no negative weight"):
        client.chat.completions.create(
            model="mix", messages=MESSAGES, extra_body={"ensemble": {"weights": {"deep": -1, "red": 2}}}
        )
