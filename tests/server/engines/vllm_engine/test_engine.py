"""The engine on a real vLLM: what it refuses, and what happens to everybody when vLLM dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from ensemble_server.ensembles.base import GenerationRequest, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import (
    EngineDeadError,
    ModelLoadError,
    RequestError,
    UnsupportedError,
)
from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.engines.vllm_engine import process
from ensemble_server.server.engines.vllm_engine.engine import VllmEngine
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.conftest import WIDE, make_adapter, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

SAY = {"messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tight = make_model(root / "tight", vocab_size=320, **WIDE)
    return {
        "tight": tight,
        "red": make_adapter(root / "red", tight, seed=3),
        "other": make_model(root / "other", **WIDE),
    }


def config_of(models: dict[str, Any], **engine: Any) -> Config:
    block = {"kind": "vllm", "max_batch": 4, "max_context": 128, "kv_cache_gb": 0.1} | engine
    block["options"] = {"enforce_eager": True} | block.get("options", {})
    return parse_config({"models": models, "engine": block}, source=Path("/config.yaml"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(models: dict[str, Path], steps: list[StepStats]) -> AsyncIterator[Hosting]:
    """One plain model."""
    config = config_of({"tight": {"path": str(models["tight"]), "dtype": "float32"}})
    async with Hosting.open(config, on_step=steps.append) as hosting:
        yield hosting


@pytest.fixture(scope="module")
def steps() -> list[StepStats]:
    return []


def ask(prompt: str | tuple[int, ...] = "To be, or not", **changes: Any) -> GenerationRequest:
    settings = {"max_tokens": 12, "ignore_eos": True} | changes.pop("sampling", {})
    return GenerationRequest(prompt=prompt, sampling=Sampling(**settings), **changes)


# --- what it answers and refuses ---


async def test_a_single_member_runs_without_an_ensemble_around_it(hosting: Hosting) -> None:
    answer = await collect(hosting.models["tight"], ask(n=2, sampling={"temperature": 0}))
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.done.usage.completion_tokens == 24
    assert answer.done.members == ("tight",)


async def test_seeds_survive_prompts_that_are_read_in_chunks(hosting: Hosting) -> None:
    long = ask(tuple([5] * 100), sampling={"seed": 3, "max_tokens": 4})
    texts = [(await collect(hosting.models["tight"], long)).text for _ in range(2)]
    assert texts[0] == texts[1]


async def test_explained_tokens_of_a_single_member_carry_its_view(hosting: Hosting) -> None:
    answer = await collect(hosting.models["tight"], ask(explain=True, top_logprobs=0))
    for token in answer.choices[0].tokens:
        assert token.members["tight"].logprob == token.logprob


async def test_bad_requests_are_refused_by_name(hosting: Hosting) -> None:
    tight = hosting.models["tight"]
    for request, error, message in (
        (ask("word " * 400), RequestError, "the prompt has .* tokens; this model's context holds 128"),
        (ask((1, 999)), RequestError, "token id 999 is outside the vocabulary of 320"),
        (ask(""), RequestError, "no tokens"),
        (ask(sampling={"logit_bias": {320: 1.0}}), RequestError, "token id 320"),
        (ask(sampling={"temperature": 0.001}), UnsupportedError, "temperatures from 0.01 on"),
    ):
        with pytest.raises(error, match=message):
            await collect(tight, request)


async def test_a_hidden_base_that_is_not_run_is_refused_by_name(models: dict[str, Path]) -> None:
    base = {"path": str(models["tight"]), "dtype": "float32", "listed": False}
    config = config_of({"base": base, "red": {"base": "base", "adapter": str(models["red"])}})
    engine = await VllmEngine.planned(config)
    with pytest.raises(UnsupportedError, match=r"'base' .* only lends its weights .* `listed: true`") as refused:
        await anext(engine.generate(Mixture({"base": 1.0}), ask(), method="member"))
    assert refused.value.param == "model"


async def test_whole_distributions_are_refused_by_name(hosting: Hosting) -> None:
    with pytest.raises(UnsupportedError, match=r"engine\.kind transformers"):
        await hosting.models["tight"].host.visit_logprobs(["tight"], [1, 2, 3], lambda *_: None)


async def test_a_deadline_ends_with_what_there_is(hosting: Hosting) -> None:
    request = ask((5,), deadline_s=0.25, sampling={"max_tokens": 120})
    answer = await collect(hosting.models["tight"], request)
    choice = answer.choices[0]
    assert choice.stop_reason == "deadline" or len(choice.token_ids) == 120  # on a fast machine


async def test_closing_early_frees_vllms_rows(hosting: Hosting, steps: list[StepStats]) -> None:
    events = hosting.models["tight"].generate(ask((5,), n=2, sampling={"max_tokens": 120}))
    await anext(events)
    await anext(events)
    await events.aclose()
    await collect(hosting.models["tight"], ask((6,), sampling={"max_tokens": 3}))
    assert steps[-1].num_running <= 1
    assert steps[-1].num_tokens["tight"] <= 1


# --- when vLLM dies ---


def core_processes() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]


async def test_ctrl_c_in_a_terminal_does_not_reach_vllm(hosting: Hosting) -> None:
    """It goes to all processes of the terminal; the server decides when vLLM ends."""
    for pid in core_processes():
        os.kill(pid, signal.SIGINT)
    answer = await collect(hosting.models["tight"], ask())
    assert answer.done.usage.completion_tokens == 12


async def test_a_dead_vllm_is_a_503_then_back_and_the_rest_of_the_server_lives(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(hosting.models, "far", ScriptedModel("far", Script(("Hi",))))
    monkeypatch.setitem(hosting._fingerprints, "far", "fp_far")
    monkeypatch.setattr(process, "BACKOFF", process.Backoff(first_s=2.0))
    config = hosting.config.server.model_copy(update={"port": 0})
    app = create_app(hosting, metrics=Metrics())
    async with (
        listening(app, config) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
    ):

        async def chat(model: str, **body: Any) -> httpx.Response:
            return await client.post("/v1/chat/completions", json=SAY | {"model": model, "max_tokens": 4} | body)

        live = asyncio.create_task(chat("tight", max_tokens=90, ignore_eos=True))
        await asyncio.sleep(0.1)
        [pid] = core_processes()
        workers = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)

        lost = await live
        refused = await chat("tight")
        for response in (lost, refused):
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "engine_restarting"
            assert int(response.headers["retry-after"]) >= 1
        assert (await chat("far")).json()["choices"][0]["message"]["content"] == "Hi"
        assert (await client.get("/health")).status_code == 503  # tight is all that is listed
        monkeypatch.setattr(hosting, "listed", ["tight", "far"])
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert (health.json()["down"], health.json()["impaired"]) == (["tight"], [])

        async with asyncio.timeout(540):  # seconds, on a machine of its own
            while (again := await chat("tight")).status_code == 503:
                await asyncio.sleep(0.25)
        assert again.status_code == 200, again.text
        assert (await client.get("/health")).json() == {"status": "ok"}
    assert "vLLM for tight died after" in caplog.text and "vLLM for tight runs again" in caplog.text
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers of the dead engine hold memory"
    assert core_processes() != [pid]


async def test_stopping_ends_live_generations_and_leaves_no_process(models: dict[str, Path]) -> None:
    """With a directory of two members, so that its shutdown is seen too."""
    members = {"tight": {"path": str(models["tight"])}, "other": {"path": str(models["other"])}}
    members["mix"] = {"method": "probability_average", "members": ["tight", "other"]}
    before = set(core_processes())
    async with Hosting.open(config_of(members)) as hosting:
        mine = set(core_processes()) - before
        assert len(mine) == 1  # both members on one
        live = asyncio.create_task(collect(hosting.models["mix"], ask((5,), sampling={"max_tokens": 120})))
        await asyncio.sleep(0.05)
    with pytest.raises(EngineDeadError, match="the engine was stopped"):
        await live
    assert not mine & set(core_processes())


# --- what is refused before anything is started ---


@pytest.mark.parametrize(
    ("changes", "engine", "message"),
    [
        ({"dtype": "bfloat16"}, {}, "has one dtype; they ask for"),
        ({"device": "cuda:1"}, {}, "leave `device: cuda:1` out"),
        ({"system_prompt": "Be brief."}, {}, "differ in their system_prompt"),
        ({}, {"options": {"enforce_eagre": True}}, "did you mean 'enforce_eager'"),
        ({}, {"options": {"max_num_seqs": 3}}, r"engine\.max_batch says that"),
        ({}, {"kv_cache_gb": None, "gpu_memory_utilization": 1.0}, r"set engine\.kv_cache_gb"),
    ],
)
async def test_configs_that_cannot_run_are_refused_before_anything_starts(
    models: dict[str, Path], changes: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    entries = {
        "tight": {"path": str(models["tight"])},
        "other": {"path": str(models["other"]), **changes},
        "mix": {"method": "probability_average", "members": ["tight", "other"]},
    }
    before = core_processes()
    with pytest.raises(ModelLoadError, match=message):
        async with Hosting.open(config_of(entries, **engine)):
            pass
    assert core_processes() == before


async def test_a_vllm_that_does_not_come_up_says_where_to_look(models: dict[str, Path]) -> None:
    config = config_of({"tight": {"path": str(models["tight"])}}, kv_cache_gb=0.00001)
    with pytest.raises(ModelLoadError, match=r"vLLM did not start for tight .*; its log above has the cause"):
        async with Hosting.open(config):
            pass
