from __future__ import annotations

from importlib.metadata import version

import pytest
from pydantic import TypeAdapter

from ensemble_server.ensembles.crowd_vote import CrowdVote
from ensemble_server.ensembles.method import Services
from ensemble_server.server.engines.scripted_engine import ScriptedModel
from ensemble_server.server.requests.responses import Health
from tests.server.api.conftest import CHAT, HELLO, asgi_client

HEALTH = TypeAdapter(Health)


async def test_a_server_that_answers_is_healthy(host):
    async with asgi_client(host()) as client:
        for path in ("/health", "/ready", "/live"):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_a_dead_engine_is_a_503_everywhere_but_in_live(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        hosting.failure = "CUDA error"
        health = await client.get("/health")
        chat = await client.post("/v1/chat/completions", json=CHAT)
        live = await client.get("/live")
    assert (health.status_code, chat.status_code, live.status_code) == (503, 503, 200)
    assert chat.json()["error"]["code"] == "engine_dead"
    assert "CUDA error" in chat.json()["error"]["message"]


def crowd(name, *members):
    config = CrowdVote.Config(
        method="crowd_vote", members=[member.name for member in members], similarity="rouge_l_word"
    )
    return CrowdVote(name, config, {member.name: member for member in members}, Services())


@pytest.fixture
def house(host):
    """A vote over two members of which one is hidden, and a vote over that vote and a third."""
    red, hidden, far = (ScriptedModel(name, HELLO) for name in ("red", "hidden", "far"))
    votes = {"inner": crowd("inner", red, hidden)}
    votes["outer"] = crowd("outer", votes["inner"], far)
    hosting = host(red=red, hidden=hidden, far=far, **votes)
    hosting.listed = ["red", "far", "inner", "outer"]
    return hosting


@pytest.mark.parametrize(
    ("dead", "down", "impaired"),
    [
        ({"red"}, ["red"], ["inner", "outer"]),
        ({"hidden"}, [], ["inner", "outer"]),
        ({"red", "hidden"}, ["red", "inner"], ["outer"]),
    ],
)
async def test_while_some_members_are_down_the_server_is_degraded_and_names_who_cannot_answer(
    house, dead, down, impaired
):
    house.down = frozenset(dead)
    async with asgi_client(house) as client:
        for path in ("/health", "/ready"):
            response = await client.get(path)
            assert response.status_code == 200
            assert response.json() == {"status": "degraded", "down": down, "impaired": impaired}
            HEALTH.validate_json(response.content, strict=True)
        assert (await client.get("/live")).json() == {"status": "ok"}


async def test_a_server_whose_models_are_all_down_is_a_503_that_names_them(house):
    house.down = frozenset({"red", "hidden"})
    house.listed = ["red", "inner"]
    async with asgi_client(house) as client:
        health, live = await client.get("/health"), await client.get("/live")
    assert (health.status_code, live.status_code) == (503, 200)
    assert health.json()["error"]["code"] == "engine_restarting"
    assert health.json()["error"]["message"].endswith("started again: red, inner")
    assert int(health.headers["retry-after"]) >= 1


async def test_a_server_that_lists_nothing_is_not_down_for_that(house):
    house.down, house.listed = frozenset({"red"}), []
    async with asgi_client(house) as client:
        assert (await client.get("/health")).json() == {"status": "degraded", "down": [], "impaired": []}


async def test_a_draining_server_lets_nobody_in(host):
    async with asgi_client(host()) as client:
        client.app.state.admission.is_draining = True
        health = await client.get("/health")
        chat = await client.post("/v1/chat/completions", json=CHAT)
        live = await client.get("/live")
    assert (health.status_code, chat.status_code, live.status_code) == (503, 503, 200)
    assert chat.headers["retry-after"]


async def test_the_version_is_the_packages(host):
    async with asgi_client(host()) as client:
        assert (await client.get("/version")).json() == {"version": version("ensemble-server")}


async def test_metrics_count_what_was_answered(host):
    async with asgi_client(host()) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        await client.post("/v1/chat/completions", json=CHAT | {"n": 0})
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    assert 'ensemble:requests_total{model="hello",status="200"} 2.0' in text
    assert 'ensemble:requests_total{model="",status="400"} 1.0' in text
    assert 'ensemble:completion_tokens_total{model="hello"} 8.0' in text
    assert 'ensemble:time_to_first_token_seconds_count{model="hello"} 2.0' in text
    assert 'ensemble:inter_token_latency_seconds_count{model="hello"} 6.0' in text
    assert 'ensemble:request_duration_seconds_count{model="hello"} 2.0' in text
    assert 'ensemble:member_answer_tokens_total{kind="completion",member="hello"} 8.0' in text
