"""Two vLLM models in one server: memory is divided between them, and when one dies the other does not notice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from ensemble_server.ensembles.base import Answer, GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import EngineRestartingError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.vllm_engine.model import VllmModel
from ensemble_server.server.hosting import Hosting
from tests.conftest import WIDE, make_model
from tests.reference import Reference, differences

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

NUM_LAYERS = {"left": 2, "right": 2, "solo": 4}
KV_CACHE_GB = 0.1
PROMPT = (5, 9, 40, 7, 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`solo` has a vocabulary of its own, so it could not be on one vLLM model with the others."""
    root = tmp_path_factory.mktemp("models")
    return {
        "left": make_model(root / "left", vocab_size=320, **WIDE),
        "right": make_model(root / "right", seed=1, **WIDE),
        "solo": make_model(root / "solo", seed=2, vocab_size=321, extra=("<|solo|>",), **WIDE, num_hidden_layers=4),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(folders: dict[str, Path]) -> AsyncIterator[Hosting]:
    models: dict[str, Any] = {name: {"path": str(folder), "dtype": "float32"} for name, folder in folders.items()}
    models["mix"] = {"method": "probability_average", "members": {"left": 1, "right": 2}}
    engine = {"kind": "vllm", "max_batch": 4, "max_context": 128, "kv_cache_gb": KV_CACHE_GB}
    engine["options"] = {"enforce_eager": True}
    async with Hosting.open(parse_config({"models": models, "engine": engine}, source=Path("/config.yaml"))) as hosting:
        yield hosting


async def answer_of(hosting: Hosting, model: str, max_tokens: int = 8) -> Answer:
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return await collect(hosting.models[model], GenerationRequest(prompt=PROMPT, sampling=sampling, top_logprobs=2))


def vllm_models(hosting: Hosting) -> dict[str, VllmModel]:
    """By one of their members."""
    return {member: hosting._engine._model_of[member] for member in ("left", "solo")}


def core_of(model: VllmModel) -> int:
    [process] = model.process.llm.engine_core.resources.engine_manager.processes
    return process.pid


def worst_difference(folders: dict[str, Path], weights: dict[str, float], answer: Answer, vocab_size: int) -> float:
    """The largest of any log-probability in `answer` to plain transformers, nats."""
    [choice] = answer.choices
    reference = Reference({name: (folders[name], None) for name in weights}, vocab_size)
    expected, _ = reference("arithmetic", weights, [*PROMPT, *choice.token_ids])
    return max(differences(choice, expected[len(PROMPT) - 1 :]))


async def test_both_answer_for_themselves(hosting: Hosting, folders: dict[str, Path]) -> None:
    mixed, solo = await asyncio.gather(answer_of(hosting, "mix"), answer_of(hosting, "solo"))
    assert worst_difference(folders, {"left": 1, "right": 2}, mixed, 320) < 1e-3
    assert worst_difference(folders, {"solo": 1}, solo, 321) < 1e-3


async def test_they_divide_the_memory_for_caches(hosting: Hosting) -> None:
    """As vLLM reports what it has allocated: blocks of tokens, each with keys and values of all layers."""
    allocated = {}
    for member, model in vllm_models(hosting).items():
        cache = model.process.llm.vllm_config.cache_config
        num_layers = sum(NUM_LAYERS[part] for part in model.plan.placement.parts)
        bytes_per_token = 2 * num_layers * WIDE["num_key_value_heads"] * WIDE["head_dim"] * 4
        allocated[member] = cache.num_gpu_blocks * cache.block_size * bytes_per_token
        share = cache.kv_cache_memory_bytes
        assert 0.9 * share < allocated[member] <= share
    assert 0.9 * KV_CACHE_GB < sum(allocated.values()) / 2**30 <= KV_CACHE_GB


async def test_one_that_dies_leaves_the_other_alone_and_comes_back(hosting: Hosting, folders: dict[str, Path]) -> None:
    ensemble, solo = vllm_models(hosting).values()
    dead, alive = core_of(ensemble), core_of(solo)
    running = asyncio.create_task(answer_of(hosting, "solo", max_tokens=100))
    await asyncio.sleep(0.05)
    os.kill(dead, signal.SIGKILL)

    with pytest.raises(EngineRestartingError, match="vLLM for left, right"):
        for _ in range(100):
            await answer_of(hosting, "mix")
    assert len((await running).choices[0].token_ids) == 100
    assert worst_difference(folders, {"solo": 1}, await answer_of(hosting, "solo"), 321) < 1e-3

    async with asyncio.timeout(540):  # seconds, on a machine of its own
        while True:
            try:
                again = await answer_of(hosting, "mix")
                break
            except EngineRestartingError:
                assert len((await answer_of(hosting, "solo")).choices[0].token_ids) == 8
                await asyncio.sleep(0.25)
    assert worst_difference(folders, {"left": 1, "right": 2}, again, 320) < 1e-3
    assert np.array_equal([core_of(solo), core_of(ensemble) == dead], [alive, False])
    assert (solo.process.num_restarts, ensemble.process.num_restarts) == (0, 1)
