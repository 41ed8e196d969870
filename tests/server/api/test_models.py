from __future__ import annotations

import pytest
from openai.types import Model
from pydantic import TypeAdapter

from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.requests import responses
from tests.gates import a_gate
from tests.server.api.conftest import CHAT, HELLO, asgi_client
from tests.server.api.houses import open_house

LIST = TypeAdapter(responses.ModelList)


class Mix(Method):
    """An ensemble that does nothing: only its description matters here."""

    Config = MethodConfig
    reference = "https://example.org"

    def generate(self, request):
        return self.models[self.members[0]].generate(request)


def ensemble(name, *members):
    config = MethodConfig(method="mix", members=list(members))
    return Mix(
        name, config, {member: ScriptedModel(member, HELLO, max_model_len=100) for member in members}, Services()
    )


async def get(hosting, path):
    async with asgi_client(hosting) as client:
        return await client.get(path)


async def test_listed_models_are_shown_in_the_configs_order_with_their_context(host):
    hosting = host(b=HELLO, a=HELLO, hidden=HELLO)
    hosting.listed = ["b", "a"]
    response = await get(hosting, "/v1/models")
    LIST.validate_json(response.content)
    shown = [Model.model_validate(model, strict=True) for model in response.json()["data"]]
    assert [model.id for model in shown] == ["b", "a", "letters"]
    assert all(
        (model.object, model.created, model.max_model_len) == ("model", 1_700_000_000, 512) for model in shown[:2]
    )
    assert not hasattr(shown[0], "ensemble")


async def test_the_embedding_model_is_listed_if_it_is_there(host):
    hosting = host()
    shown = (await get(hosting, "/v1/models")).json()["data"][-1]
    assert (shown["id"], shown["kind"], shown["explains_tokens"]) == ("letters", "embedding", False)
    assert (await get(hosting, "/v1/models/letters")).json() == shown
    hosting.embedder.is_there = False
    assert [model["id"] for model in (await get(hosting, "/v1/models")).json()["data"]] == ["hello"]
    assert (await get(hosting, "/v1/models/letters")).status_code == 404


async def test_an_ensemble_shows_its_method_and_members(host):
    response = await get(host(mix=ensemble("mix", "base", "code")), "/v1/models/mix")
    shown = response.json()["ensemble"]
    assert (shown["method"], shown["members"]) == ("mix", ["base", "code"])
    assert response.json()["max_model_len"] == 100


@pytest.mark.parametrize("path", ["/v1/models/org/model-1b", "/v1/models/org%2Fmodel-1b"])
async def test_names_with_slashes_are_found(host, path):
    response = await get(host(**{"org/model-1b": HELLO}), path)
    assert response.status_code == 200
    assert response.json()["id"] == "org/model-1b"


@pytest.mark.parametrize("name", ["nothing", "", "../../etc/passwd"])
async def test_a_model_that_is_not_there_is_a_404_with_the_names_that_are(host, name):
    response = await get(host(base=HELLO, code=HELLO), f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] in {"model_not_found", "not_found"}


async def test_an_unknown_model_of_a_request_is_a_404_with_the_nearest_name(host):
    async with asgi_client(host(base=HELLO, code=HELLO)) as client:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"prompt": "x"}),
            ("/tokenize", {"prompt": "x"}),
        ):
            response = await client.post(path, json=body | {"model": "codee"})
            assert response.status_code == 404
            assert response.json()["error"] == {
                "message": "there is no model 'codee'; did you mean 'code'? (known: base, code)",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }


async def test_the_model_may_be_left_out_where_there_is_only_one(host):
    async with asgi_client(host(only=HELLO)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).json()["model"] == "only"
    async with asgi_client(host(a=HELLO, b=HELLO)) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "model is missing; one of: a, b"


async def test_a_hidden_model_answers_who_knows_its_name(host):
    hosting = host(a=HELLO, part=Script(("part",)))
    hosting.listed = ["a"]
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"model": "part"})
    assert response.json()["choices"][0]["message"]["content"] == "part"


async def test_a_probability_average_shows_what_it_is_made_of_and_what_a_request_may_change(tmp_path, tiny):
    models = {
        "base": {"path": str(tiny["llama"])},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "mix": {"method": "probability_average", "members": {"base": 1, "red": 3}, "pool": "posterior", "share": 0.1},
        "crowd": {"method": "crowd_vote", "members": ["base", "mix"]},
        "away": {"url": "http://127.0.0.1:9/v1", "model": "far"},
    }
    async with open_house("transformers", models, tmp_path) as house:
        shown = {model["id"]: model for model in (await house.client.get("/v1/models")).json()["data"]}
    LIST.validate_python({"object": "list", "data": list(shown.values())})
    kinds = {name: model["kind"] for name, model in shown.items()}
    assert kinds.pop("all-MiniLM-L6-v2") == "embedding"
    assert kinds == {"base": "hosted", "red": "hosted", "mix": "ensemble", "crowd": "ensemble", "away": "remote"}
    assert shown["mix"]["ensemble"] == {
        "method": "probability_average",
        "members": ["base", "red"],
        "weights": {"base": 1, "red": 3},
        "pool": "posterior",
        "share": 0.1,
        "overrides": ["weights", "pool", "share", "when"],
    }
    assert "samples" in shown["crowd"]["ensemble"]["overrides"]
    assert "pool" not in shown["crowd"]["ensemble"]


async def test_a_learned_gate_is_shown_by_its_model_and_by_the_answers_that_it_moved(tmp_path, tiny):
    models = {
        "base": {"path": str(tiny["llama"])},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "mix": {"method": "probability_average", "members": ["base", "red"], "pool": "posterior"},
    }
    entries = parse_config({"models": models}, source=tmp_path / "config.yaml").models
    named = {name: identity(entries, name, tmp_path) for name in ("base", "red")}
    models["gated"] = models["mix"] | {"gate": a_gate({"base": 1, "red": 1}, 0.0, identities=named).model_dump()}
    async with open_house("transformers", models, tmp_path) as house:
        listed = (await house.client.get("/v1/models")).json()
        shown = {model["id"]: model.get("ensemble", {}) for model in listed["data"]}
        answered = {
            "gated": await house.chat("gated", max_tokens=1),
            "mix": await house.chat("mix", max_tokens=1),
            "its own share": await house.chat("gated", max_tokens=1, ensemble={"share": 0.1}),
        }
    LIST.validate_python(listed)
    assert [name for name, ensemble in shown.items() if ensemble.get("gate")] == ["gated"]
    assert [name for name, answer in answered.items() if answer["ensemble"].get("gate")] == ["gated"]
