"""Ensembles of texts through the HTTP door: tiny real models, one of them behind a second real server, nested.

Once with the embedded engine, and where vLLM is installed with vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ensemble_server.ensembles.exchange.agreement import replay
from ensemble_server.ensembles.exchange.transcript import Transcript
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.hosting import Hosting
from tests.conftest import make_embedder
from tests.server.api.conftest import ScriptedHosting, live_server
from tests.server.api.houses import ASKED, House, open_house

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = ASKED | {"max_tokens": 6, "seed": 7, "ignore_eos": True}
METHODS = ["talk", "same", "fused", "routed"]


def models_of(folders: dict[str, Path], url: str) -> dict[str, Any]:
    return {
        "llama": {"path": str(folders["llama"])},
        "deep": {"path": str(folders["deep"])},
        "red": {"base": "llama", "adapter": str(folders["red"])},
        "green": {"base": "llama", "adapter": str(folders["green"])},
        "far": {"url": url, "model": "qwen", "prompt_price_per_million": 1e6, "completion_price_per_million": 2e6},
        "dead": {"url": url, "model": "dying", "max_retries": 0, "listed": False},
        "mix": {"method": "probability_average", "members": ["llama", "deep"]},
        "adaptive": {"method": "probability_average", "members": ["red", "green"], "pool": "posterior"},
        "crowd": {"method": "crowd_vote", "members": ["mix", "adaptive", "far"], "samples": 2},
        "talk": {
            "method": "exchange_of_thought",
            "members": ["red", "green", "far"],
            "topology": "relay",
            "max_rounds": 2,
            "stop": "never",
        },
        "same": {
            "method": "exchange_of_thought",
            "participants": {
                "kitty": {"model": "red", "persona": "You are Kitty."},
                "ben": {"model": "red", "persona": "You are Ben."},
            },
            "max_rounds": 1,
        },
        "fused": {"method": "answer_fusion", "members": ["crowd", "red"], "aggregator": "mix"},
        "routed": {
            "method": "routing",
            "members": {
                "red": {"positive_prompts": ["def f(x): return?", "def x"]},
                "green": {"positive_prompts": ["love", "a poem?"]},
            },
            "top_k": 2,
        },
        "halved": {"method": "exchange_of_thought", "members": ["red", "dead"], "max_rounds": 1},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(
    engine: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    """The ensembles' server; its remote members are models of a server of their own, on the embedded engine."""
    folder = tmp_path_factory.mktemp("text_level")
    far_config = parse_config({"models": {"qwen": {"path": str(folders["qwen"])}}}, source=folder / "far.yaml")
    embedding = {"path": str(make_embedder(folder, ("def", "f", "x", "return", "love", "a", "poem")))}
    dying = ScriptedModel("dying", Script(("a", "b"), fails_at=1))
    async with Hosting.open(far_config) as far:
        away = ScriptedHosting({**far.models, "dying": dying}, {"qwen": far.surface("qwen")}, far_config.batch_folder)
        async with (
            live_server(away) as url,
            open_house(engine, models_of(folders, f"{url}/v1"), folder, body=ASK, embedding=embedding) as house,
        ):
            yield house


# --- what holds for all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", METHODS)
async def test_seeds_repeat(house: House, model: str) -> None:
    first, second = await house.chat(model), await house.chat(model)
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("model", METHODS)
async def test_streamed_text_equals_whole_text(house: House, model: str) -> None:
    message = (await house.chat(model))["choices"][0]["message"]
    reasoning, text = "", ""
    body = {**ASK, "model": model, "stream": True}
    async with house.client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    assert not (text and choice["delta"].get("reasoning_content")), "rounds come before the answer"
                    reasoning += choice["delta"].get("reasoning_content") or ""
                    text += choice["delta"].get("content") or ""
    assert (reasoning, text) == (message.get("reasoning_content", ""), message["content"])


@pytest.mark.parametrize("model", METHODS)
async def test_usage_adds_up_to_the_models_that_did_the_work(house: House, model: str) -> None:
    answer = await house.chat(model)
    by_member = answer["ensemble"]["usage"]
    assert set(by_member) <= {"llama", "deep", "red", "green", "far"}
    assert all(used["prompt_tokens"] > 0 for used in by_member.values())
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("model", METHODS)
async def test_a_client_that_leaves_frees_every_row(house: House, model: str) -> None:
    asked = asyncio.create_task(house.chat(model, max_tokens=300))
    await house.until_busy()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await house.assert_idle()


# --- what holds for each ------------------------------------------------------------------------------------------


async def test_every_ensemble_is_a_model(house: House) -> None:
    listed = {model["id"] for model in (await house.client.get("/v1/models")).json()["data"]}
    assert {"crowd", "talk", "same", "fused", "routed"} <= listed
    assert "dead" not in listed


async def test_a_vote_over_two_probability_averages_and_a_remote(house: House) -> None:
    answer = await house.chat("crowd", ensemble={"explain": True})
    shown = answer["ensemble"]
    assert (shown["method"], shown["turnout"], shown["members"]) == ("crowd_vote", 3, ["mix", "adaptive", "far"])
    assert set(shown["usage"]) == {"llama", "deep", "red", "green", "far"}
    used = shown["usage"]["far"]
    assert used["cost"] == pytest.approx(used["prompt_tokens"] + 2 * used["completion_tokens"])
    candidates = shown["trace"]["candidates"]
    assert answer["choices"][0]["message"]["content"] in [candidate["text"] for candidate in candidates]


async def test_an_exchange_between_experts_and_a_remote(house: House) -> None:
    answer = await house.chat("talk", ensemble={"explain": True})
    transcript = Transcript.model_validate(answer["ensemble"]["trace"])
    assert replay(transcript) == (list(transcript.states), [])
    assert [sorted(round_.replies) for round_ in transcript.rounds] == [["far", "green", "red"]] * 3
    final = transcript.states[-1]
    assert answer["choices"][0]["message"]["content"] == transcript.rounds[-1].replies[final.spokesperson].text
    assert answer["choices"][0]["message"]["reasoning_content"].count("## Round") == 3


async def test_one_model_under_two_personas(house: House) -> None:
    shown = (await house.chat("same", ensemble={"explain": True}))["ensemble"]
    assert shown["members"] == ["kitty", "ben"]
    assert set(shown["usage"]) == {"red"}


async def test_fusion_of_a_vote_and_a_model_by_a_probability_average(house: House) -> None:
    answer = await house.chat("fused", ensemble={"explain": True})
    shown = answer["ensemble"]
    assert (shown["method"], shown["members"]) == ("answer_fusion", ["crowd", "red", "mix"])
    assert set(shown["usage"]) == {"llama", "deep", "red", "green", "far"}
    vote, single = shown["trace"]["layers"][0]["candidates"]
    assert len(vote["trace"]["candidates"]) == 6
    assert single["member"] == "red"


@pytest.mark.slow
async def test_the_aggregators_logprobs_are_those_of_the_fusion(house: House) -> None:
    choice = (await house.chat("fused", logprobs=True, top_logprobs=2))["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == ASK["max_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


async def test_gates_become_the_weights_of_an_average(house: House) -> None:
    answer = await house.chat("routed", ensemble={"explain": True})
    trace = answer["ensemble"]["trace"]
    assert trace["averaged"]
    assert trace["gates"]["red"] > trace["gates"]["green"]  # the prompt is about a function
    one = await house.chat("routed", ensemble={"explain": True, "top_k": 1})
    assert one["ensemble"]["trace"]["answered"] == ["red"]
    alone = await house.chat("red")
    assert one["choices"][0]["message"] == alone["choices"][0]["message"]


async def test_a_member_that_dies_mid_answer_is_left_out_with_its_reason(house: House) -> None:
    shown = (await house.chat("halved", ensemble={"explain": True}))["ensemble"]
    assert shown["turnout"] == 1
    assert "member 'dead'" in shown["trace"]["rounds"][0]["silent"]["dead"]


async def test_too_few_members_are_a_503_that_names_them(house: House) -> None:
    body = {**ASK, "model": "halved", "ensemble": {"min_turnout": 2}}
    response = await house.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 503
    assert "member 'dead'" in response.json()["error"]["message"]


async def test_what_no_ensemble_of_texts_can_honour_is_a_400_that_names_it(house: House) -> None:
    for more, param in (({"logprobs": True}, "logprobs"), ({"ensemble": {"topologi": "relay"}}, "ensemble.topologi")):
        response = await house.client.post("/v1/chat/completions", json={**ASK, "model": "talk", **more})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


async def test_completions_take_ensembles_of_texts_too(house: House) -> None:
    body = {
        "model": "talk",
        "prompt": ["def f(x):", "Q:"],
        "max_tokens": 4,
        "ignore_eos": True,
        "ensemble": {"explain": True},
    }
    response = await house.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 2


async def test_several_choices_are_several_exchanges(house: House) -> None:
    answer = await house.chat("talk", n=2, ensemble={"explain": True})
    assert len(answer["choices"]) == 2
    assert len(answer["ensemble"]["trace"]["choices"]) == 2
