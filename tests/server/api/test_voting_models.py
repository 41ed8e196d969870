"""Votes and rankings as models behind the HTTP door, over tiny real models: one contract for all of them.

Once with the embedded engine, and where vLLM is installed with vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.server.api.houses import ASKED, House, open_house

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = ASKED | {"max_tokens": 6, "seed": 7}
METHODS = ["crowd", "major", "judged", "likely", "nested"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(
    engine: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    models = {
        "llama": {"path": str(folders["llama"])},
        "deep": {"path": str(folders["deep"])},
        "red": {"base": "llama", "adapter": str(folders["red"])},
        "mix": {"method": "probability_average", "members": ["llama", "deep"]},
        "crowd": {"method": "crowd_vote", "members": ["llama", "deep", "red"], "similarity": ["rouge_l_char"]},
        "major": {"method": "majority", "members": ["llama", "deep"], "samples": 3},
        "judged": {"method": "ranking", "members": ["llama", "deep", "red"], "judge": "mix"},
        "likely": {"method": "ranking", "members": ["llama", "mix"], "samples": 2},
        "nested": {"method": "crowd_vote", "members": ["judged", "major", "mix"]},
    }
    async with open_house(engine, models, tmp_path_factory.mktemp("votes"), body=ASK) as house:
        yield house


@pytest.mark.parametrize("model", METHODS)
async def test_seeds_repeat(house: House, model: str) -> None:
    first, second = await house.chat(model), await house.chat(model)
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["message"]["content"].strip()
    assert first["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("model", METHODS)
async def test_streamed_text_equals_whole_text(house: House, model: str) -> None:
    whole = await house.chat(model)
    text, finish_reasons = "", []
    body = {**ASK, "model": model, "stream": True}
    async with house.client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert text == whole["choices"][0]["message"]["content"]
    assert finish_reasons == [whole["choices"][0]["finish_reason"]]


@pytest.mark.parametrize("model", METHODS)
async def test_usage_adds_up_to_the_models_that_did_the_work(house: House, model: str) -> None:
    answer = await house.chat(model, ensemble={"explain": True})
    by_member = answer["ensemble"]["usage"]
    assert set(by_member) <= {"llama", "deep", "red"}
    assert all(used["prompt_tokens"] > 0 for used in by_member.values())
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    texts = [candidate["text"] for candidate in answer["ensemble"]["trace"]["candidates"]]
    assert answer["choices"][0]["message"]["content"] in texts


@pytest.mark.parametrize("model", METHODS)
async def test_several_choices_begin_with_the_single_one_and_differ(house: House, model: str) -> None:
    one, three = await house.chat(model), await house.chat(model, n=3)
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("model", METHODS)
async def test_a_client_that_leaves_frees_every_row(house: House, model: str) -> None:
    asked = asyncio.create_task(house.chat(model, max_tokens=300, ignore_eos=True))
    await house.until_busy()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await house.assert_idle()


async def test_the_judge_gives_preferences_from_both_orders(house: House) -> None:
    trace = (await house.chat("judged", ensemble={"explain": True}))["ensemble"]["trace"]
    assert trace["num_judgements"] == 6
    assert trace["num_failed_judgements"] == 0
    for i, row in enumerate(trace["preferences"]):
        for j, preference in enumerate(row):
            assert preference + trace["preferences"][j][i] == pytest.approx(1)
            assert 0 < preference < 1


async def test_the_likeliest_candidate_has_the_highest_mean_log_probability(house: House) -> None:
    trace = (await house.chat("likely", ensemble={"explain": True}))["ensemble"]["trace"]
    assert len(trace["scores"]) == 4
    assert trace["scores"][trace["winner"]] == max(trace["scores"]) < 0


async def test_structured_output_reaches_the_candidates(house: House) -> None:
    answer = await house.chat(
        "crowd", structured_outputs={"choice": ["left", "right"]}, max_tokens=20, ensemble={"explain": True}
    )
    texts = {candidate["text"] for candidate in answer["ensemble"]["trace"]["candidates"]}
    assert texts <= {"left", "right"}


async def test_a_raw_prompt_is_voted_on_too(house: House) -> None:
    for model in METHODS:
        body = {"model": model, "prompt": "def f(x):", "max_tokens": 4, "seed": 7}
        response = await house.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"]
