"""The whole way: HTTP to the engine and back, over tiny real models, against the independent reference.

Everything here runs once per engine: with the embedded one, and where vLLM is installed (`make test-vllm`) with vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import pytest_asyncio

from tests.reference import Reference
from tests.server.api.conftest import events_of, until
from tests.server.api.feature_table import FEATURES, PROBES
from tests.server.api.houses import ASKED, House, open_house

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "The quick brown fox jumps over the lazy dog."


def models_of(folders: dict[str, Path]) -> dict[str, Any]:
    members = {"llama": 1, "red": 2, "deep": 1}
    return {
        "llama": {"path": str(folders["llama"]), "dtype": "float32"},
        "deep": {"path": str(folders["deep"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(folders["red"])},
        "mix": {"method": "probability_average", "members": members},
        "adaptive": {"method": "probability_average", "members": members, "pool": "posterior", "share": 0.01},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(
    engine: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    models, folder = models_of(folders), tmp_path_factory.mktemp("house")
    limits = {"max_batch": 8, "max_context": 256, "prefill_chunk": 16}
    async with open_house(engine, models, folder, limits=limits, server={"max_queue": 16}) as house:
        yield house


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path], house: House) -> Reference:
    members = {
        "llama": (folders["llama"], None),
        "red": (folders["llama"], folders["red"]),
        "deep": (folders["deep"], None),
    }
    return Reference(members, house.hosting.surface("llama").vocab_size)


@pytest.mark.parametrize(("model", "pool", "share"), [("mix", "arithmetic", 0.0), ("adaptive", "posterior", 0.01)])
async def test_echoed_prompts_score_as_the_reference_scores_them(house, reference, model, pool, share):
    """As lm-evaluation-harness asks: several lists of ids, one new token, echo."""
    ids = house.hosting.surface(model).encode(TEXT)
    answer = await house.complete(
        model=model, prompt=[ids, ids[:7]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    pooled, _ = reference(pool, {"llama": 1, "red": 2, "deep": 1}, ids, share)
    expected = [pooled[place - 1, token_id] for place, token_id in enumerate(ids) if place]
    for choice, length in zip(answer["choices"], (len(ids), 7), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == length + 1
        assert logprobs["token_logprobs"][0] is None
        assert np.allclose(logprobs["token_logprobs"][1:-1], expected[: length - 1], atol=1e-3)
        for place in range(1, length):
            is_greedy = logprobs["token_logprobs"][place] == max(logprobs["top_logprobs"][place].values())
            assert is_greedy == (pooled[place - 1].argmax() == ids[place])


@pytest.mark.parametrize("model", ["llama", "mix", "adaptive"])
async def test_a_prompt_alone_is_scored_like_a_prompt_with_an_answer(house, model):
    alone = await house.complete(model=model, prompt=TEXT, max_tokens=0, logprobs=2, echo=True)
    with_answer = await house.complete(model=model, prompt=TEXT, max_tokens=3, logprobs=2, echo=True)
    scores = alone["choices"][0]["logprobs"]["token_logprobs"]
    assert np.allclose(scores[1:], with_answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(scores)], atol=1e-4)
    assert alone["choices"][0]["text"] == TEXT
    assert alone["usage"]["completion_tokens"] == 0


async def test_each_member_shows_its_own_best_tokens(house, engine):
    if engine == "vllm":
        pytest.skip("vLLM gives the mixture's log-probabilities, not each member's")
    asked = {"max_tokens": 3, "ignore_eos": True, "temperature": 0}
    answer = await house.chat(model="mix", logprobs=True, top_logprobs=2, ensemble={"explain": {"top": 4}}, **asked)
    first = answer["choices"][0]["logprobs"]["content"][0]
    for name, view in first["members"].items():
        alone = await house.chat(model=name, logprobs=True, top_logprobs=4, **asked)
        own = alone["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert [token["token"] for token in view["top"]] == [token["token"] for token in own]
        assert [token["logprob"] for token in view["top"]] == pytest.approx(
            [token["logprob"] for token in own], abs=1e-3
        )
    ids = [token["token_id"] for token in first["top_logprobs"]]
    assert first["token_id"] == ids[0]
    assert house.hosting.surface("mix").decode(ids) == "".join(token["token"] for token in first["top_logprobs"])


async def test_a_posterior_shows_whom_the_prompt_speaks_for(house, engine):
    if engine == "vllm":
        pytest.skip("vLLM gives the mixture's log-probabilities, not each member's")
    answer = await house.chat(model="adaptive", max_tokens=1, ignore_eos=True, ensemble={"explain": True})
    weights = answer["ensemble"]["trace"]["weights"]
    assert weights["prior"] == pytest.approx({"llama": 0.25, "red": 0.5, "deep": 0.25})
    first = answer["choices"][0]["logprobs"]["content"][0]["members"]
    assert weights["after_prompt"] == {name: view["weight"] for name, view in first.items()}
    assert weights["after_prompt"] != weights["prior"]


async def test_explained_tokens_pool_to_the_logprob_that_is_shown(house, engine):
    if engine == "vllm":
        pytest.skip("vLLM does not show each member's view; test_features_are_where_the_table_says has its refusal")
    answer = await house.chat(model="mix", max_tokens=6, ignore_eos=True, seed=3, ensemble={"explain": True})
    for token in answer["choices"][0]["logprobs"]["content"]:
        views = token["members"]
        assert set(views) == {"llama", "red", "deep"}
        assert sum(view["weight"] for view in views.values()) == pytest.approx(1)
        pooled = sum(view["weight"] * np.exp(view["logprob"]) for view in views.values())
        assert np.log(pooled) == pytest.approx(token["logprob"], abs=1e-4)
        assert token["entropy"] > 0
        assert 0 <= token["disagreement"] <= np.log(3)


async def test_weights_of_a_request_win_over_the_configs(house):
    alone = await house.chat(model="red", max_tokens=8, temperature=0, ignore_eos=True)
    mixed = await house.chat(
        model="mix", max_tokens=8, temperature=0, ignore_eos=True, ensemble={"weights": {"red": 1}}
    )
    assert mixed["choices"][0]["message"] == alone["choices"][0]["message"]
    assert set(mixed["ensemble"]["usage"]) == {"red"}


@pytest.mark.parametrize(
    ("override", "param"),
    [
        ({"weights": {"nobody": 1}}, "ensemble.weights"),
        ({"weights": {"red": -1}}, "ensemble.weights"),
        ({"pool": "harmonic"}, "ensemble.pool"),
        ({"poool": "arithmetic"}, "ensemble.poool"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_wrong_overrides_are_a_400_that_names_them(house, override, param, stream):
    body = ASKED | {"model": "mix", "ensemble": override, "stream": stream}
    response = await house.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("model", ["llama", "mix", "adaptive"])
async def test_streamed_text_equals_whole_text(house, model):
    body = {"model": model, "max_tokens": 24, "seed": 5, "n": 2, "ignore_eos": True, "logprobs": True}
    whole = await house.chat(**body)
    response = await house.client.post("/v1/chat/completions", json=ASKED | body | {"stream": True})
    texts, tokens = ["", ""], [[], []]
    for event in events_of(response.text)[:-1]:
        choice = orjson.loads(event)["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        tokens[choice["index"]] += (choice["logprobs"] or {}).get("content", [])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert [[token["bytes"] for token in listed] for listed in tokens] == [
        [token["bytes"] for token in choice["logprobs"]["content"]] for choice in whole["choices"]
    ]


async def test_a_seed_repeats_choices_that_differ_from_each_other(house):
    body = {"model": "mix", "max_tokens": 12, "seed": 11, "n": 3, "ignore_eos": True}
    first, second = await house.chat(**body), await house.chat(**body)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
async def test_every_64_bit_seed_is_taken(house, seed):
    await house.chat(model="llama", max_tokens=2, seed=seed)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-300},
        {"temperature": 2, "top_p": 1e-300},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 10},
        {"top_k": 2**31 - 1},
        {"min_p": 1},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"logit_bias": {str(token): -100 for token in range(300)}},
        {"max_tokens": 1, "min_tokens": 1},
        {"stop": ["\ud7ff", "\x00", "a" * 1000]},
    ],
    ids=lambda extreme: next(iter(extreme)),
)
async def test_extreme_values_within_the_ranges_are_answered(house, extreme):
    answer = await house.chat(**{"model": "mix", "max_tokens": 3} | extreme)
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}


async def test_a_token_that_a_bias_forbids_does_not_come(house):
    greedy = {"model": "mix", "max_tokens": 1, "temperature": 0, "logprobs": True, "return_token_ids": True}
    [likeliest] = (await house.chat(**greedy))["choices"][0]["token_ids"]
    [other] = (await house.chat(**greedy, logit_bias={str(likeliest): -100}))["choices"][0]["token_ids"]
    assert other != likeliest


async def test_usage_counts_each_members_tokens(house):
    answer = await house.chat(model="mix", max_tokens=5, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5
    assert set(answer["ensemble"]["usage"]) == {"llama", "red", "deep"}
    assert all(used["completion_tokens"] == 5 for used in answer["ensemble"]["usage"].values())


async def test_a_prompt_that_is_too_long_is_a_400_and_is_cut_on_request(house):
    long = {"model": "mix", "prompt": TEXT * 40, "max_tokens": 2}
    response = await house.client.post("/v1/completions", json=long)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "256" in response.json()["error"]["message"]
    cut = await house.complete(**long, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == 254
    few = await house.complete(**long, truncate_prompt_tokens=5)
    assert few["usage"]["prompt_tokens"] == 5


async def test_structured_output_matches_its_schema(house):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["s", "m"]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = await house.chat(model="mix", response_format=wanted, max_tokens=200, seed=1)
    assert answer["choices"][0]["finish_reason"] == "stop"
    value = json.loads(answer["choices"][0]["message"]["content"])
    assert isinstance(value["ok"], bool)
    assert value["size"] in ("s", "m")
    chosen = await house.chat(model="mix", structured_outputs={"choice": ["yes", "no"]}, max_tokens=20, seed=1)
    assert chosen["choices"][0]["message"]["content"] in ("yes", "no")


async def test_a_forced_tool_call_has_valid_arguments(house):
    function = {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    }
    tools = [{"type": "function", "function": function}]
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        answer = await house.chat(model="mix", tools=tools, tool_choice=choice, max_tokens=200, seed=1)
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"
        assert json.loads(call["function"]["arguments"])["colour"] in ("red", "blue")
        assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_client_that_leaves_frees_its_rows_at_once(house):
    body = ASKED | {"model": "mix", "stream": True, "max_tokens": 200, "ignore_eos": True, "n": 2}
    async with house.client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for _ in response.aiter_lines():
            break
        assert house.steps[-1].num_running >= 1
    house.steps.clear()
    await house.assert_idle()


async def test_a_full_queue_is_a_429_and_those_inside_are_answered(house):
    """8 run, 16 wait: of 40 requests some must be refused, and a refused one says when to come back."""
    body = ASKED | {"model": "llama", "max_tokens": 40, "ignore_eos": True}
    responses = await asyncio.gather(*(house.client.post("/v1/chat/completions", json=body) for _ in range(40)))
    refused = [response for response in responses if response.status_code == 429]
    assert {response.status_code for response in responses} == {200, 429}
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert all(response.json()["usage"]["completion_tokens"] == 40 for response in responses if response not in refused)


async def test_more_prompts_than_the_queue_holds_are_answered_all_the_same(house):
    answer = await house.complete(model="llama", prompt=["a"] * 60, max_tokens=1)
    assert len(answer["choices"]) == 60


@pytest.mark.slow
async def test_requests_of_many_kinds_run_side_by_side(house):
    greedy = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    models = ["llama", "red", "deep", "mix", "adaptive"] * 3
    alone = {model: await house.chat(model=model, **greedy) for model in set(models)}
    together = await asyncio.gather(*(house.chat(model=model, **greedy) for model in models))
    for model, answer in zip(models, together, strict=True):
        assert answer["choices"][0]["message"] == alone[model]["choices"][0]["message"]
    await until(lambda: house.steps[-1].num_running <= len(models))


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
async def test_features_are_where_the_table_says(house, engine, row):
    """docs/scaling-out.md: what it calls refused is a 400 that names the field, all else is answered."""
    path, body = PROBES[row.name]
    response = await house.client.post(path, json={"model": "mix", "max_tokens": 3} | body)
    wanted = row.cells[engine]
    if wanted.startswith("refused"):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] in wanted
    else:
        assert response.status_code == 200, response.text
