"""The whole way, HTTP to the engine and back, over two families whose members are averaged over text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import make_model
from tests.server.api.conftest import events_of
from tests.server.api.houses import ASKED, House, open_house
from tests.server.engines.transformers_engine.vocabularies import byte_fallback

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The quick brown fox"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("mixed")
    byte_fallback(make_model(folder / "gemma", "gemma3_text", seed=5, vocab_size=440))
    members = ["llama", "red", "gemma"]
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(tiny["red"])},
        "gemma": {"path": str(folder / "gemma"), "dtype": "float32"},
        "mix": {"method": "probability_average", "members": members},
        "adaptive": {"method": "probability_average", "members": members, "pool": "posterior", "share": 0.05},
        "vote": {"method": "majority", "members": ["mix", "adaptive"], "answer": "text"},
    }
    limits = {"max_batch": 8, "max_context": 256, "prefill_chunk": 16}
    async with open_house("transformers", models, folder, limits=limits, server={"max_queue": 16}) as house:
        yield house


async def test_streamed_chats_are_whole_chats(house: House) -> None:
    body = ASKED | {"model": "mix", "max_tokens": 8, "temperature": 0, "logprobs": True}
    whole = await house.chat(**body)
    response = await house.client.post("/v1/chat/completions", json=body | {"stream": True})
    chunks = [json.loads(event) for event in events_of(response.text) if event != "[DONE]"]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    tokens = [token for choice in choices if choice.get("logprobs") for token in choice["logprobs"]["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert len(tokens) == whole["usage"]["completion_tokens"] == 8
    assert whole["ensemble"]["vocabulary"] == "bytes"


async def test_chats_tell_alternatives_whole_and_streamed(house: House) -> None:
    body = ASKED | {"model": "mix", "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    body |= {"ensemble": {"explain": {"top": 2}}}
    whole = await house.chat(**body)
    listed = whole["choices"][0]["logprobs"]["content"]
    assert len(listed) == 6
    for token in listed:
        for top, num in ((token["top_logprobs"], 3), *((view["top"], 2) for view in token["members"].values())):
            assert 0 < len(top) <= num
            logprobs = [one["logprob"] for one in top]
            assert logprobs == sorted(logprobs, reverse=True)
            assert all(bytes(one["bytes"]).decode(errors="replace") == one["token"] for one in top)
    response = await house.client.post("/v1/chat/completions", json=body | {"stream": True})
    chunks = [json.loads(event) for event in events_of(response.text) if event != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("logprobs")]
    streamed = [token for choice in choices for token in choice["logprobs"]["content"]]
    for ours, theirs in zip(streamed, listed, strict=True):
        assert [one["bytes"] for one in ours["top_logprobs"]] == [one["bytes"] for one in theirs["top_logprobs"]]


async def test_completions_tell_alternatives_and_the_piece_itself(house: House) -> None:
    whole = await house.complete(model="adaptive", prompt=PROMPT, max_tokens=5, temperature=1, seed=1, logprobs=4, n=2)
    for choice in whole["choices"]:
        lists = choice["logprobs"]
        assert len(lists["top_logprobs"]) == len(lists["tokens"]) == 5
        for token, logprob, top in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True):
            assert top[token] == logprob and 1 < len(top) <= 5


async def test_who_drove_each_piece_is_told(house: House) -> None:
    whole = await house.chat("adaptive", max_tokens=6, temperature=0, ensemble={"explain": True})
    for token in whole["choices"][0]["logprobs"]["content"]:
        assert set(token["members"]) == {"llama", "red", "gemma"}
        assert sum(view["weight"] for view in token["members"].values()) == pytest.approx(1)
    trace = whole["ensemble"]["trace"]
    assert set(trace["weights"]) == {"prior", "after_prompt"}
    assert all(told["rows"] > 0 for told in trace["members"].values())


async def test_prompts_are_echoed_with_their_scores(house: House) -> None:
    whole = await house.complete(model="mix", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    choice = whole["choices"][0]
    assert choice["text"] == PROMPT
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == PROMPT
    assert logprobs["token_logprobs"][0] is None
    assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])


@pytest.mark.slow
async def test_prompts_are_echoed_before_what_follows_them_whole_and_streamed(house: House) -> None:
    body = {"model": "mix", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    alone = await house.complete(**body)
    whole = await house.complete(**body, echo=True, logprobs=0)
    text = PROMPT + alone["choices"][0]["text"]
    assert whole["choices"][0]["text"] == text
    lists = whole["choices"][0]["logprobs"]
    assert len(lists["tokens"]) == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    assert lists["text_offset"] == sorted(lists["text_offset"]) and lists["text_offset"][0] == 0
    response = await house.client.post("/v1/completions", json=body | {"echo": True, "stream": True})
    chunks = [json.loads(event) for event in events_of(response.text) if event != "[DONE]"]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == text


@pytest.mark.slow
async def test_several_choices_repeat_with_their_seed_and_end_at_stop_strings(house: House) -> None:
    body = ASKED | {"model": "adaptive", "max_tokens": 8, "temperature": 1, "n": 2, "seed": 7}
    first, again = await house.chat(**body), await house.chat(**body)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert texts[0] != texts[1]
    stop = texts[0][3:5]
    (stopped, _) = (await house.chat(**body, stop=[stop]))["choices"]
    assert stopped["message"]["content"] == texts[0][: texts[0].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


async def test_alternatives_to_tokens_of_a_prompt_are_told(house: House) -> None:
    body = {"model": "mix", "prompt": "The quick", "max_tokens": 0, "echo": True, "logprobs": 2}
    lists = (await house.complete(**body))["choices"][0]["logprobs"]
    assert lists["top_logprobs"][0] is None
    for token, logprob, top in list(zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True))[
        1:
    ]:
        assert top[token] == logprob and 2 <= len(top) <= 3


@pytest.mark.slow
async def test_structured_output_several_choices_and_votes(house: House) -> None:
    body = {"model": "mix", "prompt": PROMPT, "max_tokens": 30, "n": 2, "seed": 3}
    whole = await house.complete(**body, structured_outputs={"regex": "(ja|nein) ☺"})
    assert {choice["text"] for choice in whole["choices"]} <= {"ja ☺", "nein ☺"}
    voted = await house.chat("vote", max_tokens=4)
    assert voted["ensemble"]["turnout"] == 2


async def test_labels_of_a_raw_prompt_are_scored(house: House) -> None:
    body = {"model": "mix", "prompt": "It is", "labels": ["good", "bad"]}
    response = await house.client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(house: House, more: dict, param: str) -> None:
    response = await house.client.post("/v1/chat/completions", json=ASKED | {"model": "mix"} | more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_one_member_that_weights_leave_is_that_member(house: House) -> None:
    alone = await house.chat("gemma", max_tokens=6, temperature=0)
    left = await house.chat("mix", max_tokens=6, temperature=0, ensemble={"weights": {"gemma": 1}})
    assert left["choices"][0]["message"] == alone["choices"][0]["message"]
    assert "vocabulary" not in left["ensemble"]
