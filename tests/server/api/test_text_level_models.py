"""Ensembles of texts through the HTTP door: tiny real models, one of them behind a second real server, nested."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from ensembles.exchange.agreement import replay
from ensembles.exchange.transcript import Transcript
from server.api.app import create_app
from server.api.serve import listening
from server.config import parse_config
from server.engines.engine import StepStats
from server.engines.scripted_engine import Script, ScriptedModel
from server.hosting import Hosting
from server.metrics import Metrics
from tests.server.api.conftest import ScriptedHosting, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = {"messages": [{"role": "user", "content": "def f(x): return?"}], "max_tokens": 6, "seed": 7, "ignore_eos": True}
METHODS = ["talk", "same", "fused", "routed"]


def config_of(tiny: dict[str, Path], url: str) -> dict[str, Any]:
    return {
        "models": {
            "llama": {"path": str(tiny["llama"])},
            "deep": {"path": str(tiny["deep"])},
            "red": {"base": "llama", "adapter": str(tiny["red"])},
            "green": {"base": "llama", "adapter": str(tiny["green"])},
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
                    "red": {"positive_prompts": ["python", "function"]},
                    "green": {"positive_prompts": ["love", "poem"]},
                },
                "top_k": 2,
            },
            "halved": {"method": "exchange_of_thought", "members": ["red", "dead"], "max_rounds": 1},
        }
    }


@dataclass
class House:
    client: httpx.AsyncClient | None = None
    last_step: StepStats | None = None  # of the ensembles' server

    def remember(self, step: StepStats) -> None:
        self.last_step = step


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """The ensembles' server; its remote members are models of a server of their own."""
    folder = tmp_path_factory.mktemp("text_level")
    far_config = parse_config({"models": {"qwen": {"path": str(tiny["qwen"])}}}, source=folder / "far.yaml")
    house = House()
    dying = ScriptedModel("dying", Script(("a", "b"), fails_at=1))
    async with Hosting.open(far_config) as far:
        away = ScriptedHosting({**far.models, "dying": dying}, {"qwen": far.surface("qwen")}, far_config.batch_folder)
        async with listening(create_app(away, metrics=Metrics()), away.config.server) as port:
            near_config = parse_config(config_of(tiny, f"http://127.0.0.1:{port}/v1"), source=folder / "near.yaml")
            async with Hosting.open(near_config, on_step=house.remember) as near:
                transport = httpx.ASGITransport(app=create_app(near, metrics=Metrics()), raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://near", timeout=60) as house.client:
                    yield house


@pytest.fixture
def client(house: House) -> httpx.AsyncClient:
    return house.client


async def chat(client: httpx.AsyncClient, model: str, **more: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={**ASK, "model": model, **more})
    assert response.status_code == 200, response.text
    return response.json()


# --- what holds for all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", METHODS)
async def test_seeds_repeat(client: httpx.AsyncClient, model: str) -> None:
    first, second = await chat(client, model), await chat(client, model)
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("model", METHODS)
async def test_streamed_text_equals_whole_text(client: httpx.AsyncClient, model: str) -> None:
    message = (await chat(client, model))["choices"][0]["message"]
    reasoning, text = "", ""
    body = {**ASK, "model": model, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    assert not (text and choice["delta"].get("reasoning_content")), "rounds come before the answer"
                    reasoning += choice["delta"].get("reasoning_content") or ""
                    text += choice["delta"].get("content") or ""
    assert (reasoning, text) == (message.get("reasoning_content", ""), message["content"])


@pytest.mark.parametrize("model", METHODS)
async def test_usage_adds_up_to_the_models_that_did_the_work(client: httpx.AsyncClient, model: str) -> None:
    answer = await chat(client, model)
    by_member = answer["ensemble"]["usage"]
    assert set(by_member) <= {"llama", "deep", "red", "green", "far"}
    assert all(used["prompt_tokens"] > 0 for used in by_member.values())
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("model", METHODS)
async def test_a_client_that_leaves_frees_every_row(house: House, model: str) -> None:
    house.last_step = None
    asked = asyncio.create_task(chat(house.client, model, max_tokens=300))
    await until(lambda: house.last_step is not None and house.last_step.num_running > 0, timeout_s=20)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await asyncio.sleep(0.3)
    settled = house.last_step
    await asyncio.sleep(0.3)
    assert house.last_step is settled, "the engine still steps for nobody"


# --- what holds for each ------------------------------------------------------------------------------------------


async def test_every_ensemble_is_a_model(client: httpx.AsyncClient) -> None:
    listed = {model["id"] for model in (await client.get("/v1/models")).json()["data"]}
    assert {"crowd", "talk", "same", "fused", "routed"} <= listed
    assert "dead" not in listed


async def test_a_vote_over_two_probability_averages_and_a_remote(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "crowd", ensemble={"explain": True})
    shown = answer["ensemble"]
    assert (shown["method"], shown["turnout"], shown["members"]) == ("crowd_vote", 3, ["mix", "adaptive", "far"])
    assert set(shown["usage"]) == {"llama", "deep", "red", "green", "far"}
    used = shown["usage"]["far"]
    assert used["cost"] == pytest.approx(used["prompt_tokens"] + 2 * used["completion_tokens"])
    candidates = shown["trace"]["candidates"]
    assert answer["choices"][0]["message"]["content"] in [candidate["text"] for candidate in candidates]


async def test_an_exchange_between_experts_and_a_remote(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "talk", ensemble={"explain": True})
    transcript = Transcript.model_validate(answer["ensemble"]["trace"])
    assert replay(transcript) == (list(transcript.states), [])
    assert [sorted(round_.replies) for round_ in transcript.rounds] == [["far", "green", "red"]] * 3
    final = transcript.states[-1]
    assert answer["choices"][0]["message"]["content"] == transcript.rounds[-1].replies[final.spokesperson].text
    assert answer["choices"][0]["message"]["reasoning_content"].count("## Round") == 3


async def test_one_model_under_two_personas(client: httpx.AsyncClient) -> None:
    shown = (await chat(client, "same", ensemble={"explain": True}))["ensemble"]
    assert shown["members"] == ["kitty", "ben"]
    assert set(shown["usage"]) == {"red"}


async def test_fusion_of_a_vote_and_a_model_by_a_probability_average(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "fused", ensemble={"explain": True})
    shown = answer["ensemble"]
    assert (shown["method"], shown["members"]) == ("answer_fusion", ["crowd", "red", "mix"])
    assert set(shown["usage"]) == {"llama", "deep", "red", "green", "far"}
    vote, single = shown["trace"]["layers"][0]["candidates"]
    assert len(vote["trace"]["candidates"]) == 6
    assert single["member"] == "red"


async def test_the_aggregators_logprobs_are_those_of_the_fusion(client: httpx.AsyncClient) -> None:
    choice = (await chat(client, "fused", logprobs=True, top_logprobs=2))["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == ASK["max_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


async def test_gates_become_the_weights_of_an_average(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "routed", ensemble={"explain": True})
    trace = answer["ensemble"]["trace"]
    assert trace["averaged"]
    assert trace["gates"]["red"] > trace["gates"]["green"]  # the prompt is about a function
    one = await chat(client, "routed", ensemble={"explain": True, "top_k": 1})
    assert one["ensemble"]["trace"]["answered"] == ["red"]
    alone = await chat(client, "red")
    assert one["choices"][0]["message"] == alone["choices"][0]["message"]


async def test_a_member_that_dies_mid_answer_is_left_out_with_its_reason(client: httpx.AsyncClient) -> None:
    shown = (await chat(client, "halved", ensemble={"explain": True}))["ensemble"]
    assert shown["turnout"] == 1
    assert "member 'dead'" in shown["trace"]["rounds"][0]["silent"]["dead"]


async def test_too_few_members_are_a_503_that_names_them(client: httpx.AsyncClient) -> None:
    body = {**ASK, "model": "halved", "ensemble": {"min_turnout": 2}}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 503
    assert "member 'dead'" in response.json()["error"]["message"]


async def test_what_no_ensemble_of_texts_can_honour_is_a_400_that_names_it(client: httpx.AsyncClient) -> None:
    for more, param in (({"logprobs": True}, "logprobs"), ({"ensemble": {"topologi": "relay"}}, "ensemble.topologi")):
        response = await client.post("/v1/chat/completions", json={**ASK, "model": "talk", **more})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


async def test_completions_take_ensembles_of_texts_too(client: httpx.AsyncClient) -> None:
    body = {
        "model": "talk",
        "prompt": ["def f(x):", "Q:"],
        "max_tokens": 4,
        "ignore_eos": True,
        "ensemble": {"explain": True},
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 2


async def test_several_choices_are_several_exchanges(client: httpx.AsyncClient) -> None:
    answer = await chat(client, "talk", n=2, ensemble={"explain": True})
    assert len(answer["choices"]) == 2
    assert len(answer["ensemble"]["trace"]["choices"]) == 2
