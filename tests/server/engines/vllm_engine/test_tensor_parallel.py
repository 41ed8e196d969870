"""`tensor_parallel: 2`: vLLM's core and two workers, and the answers of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from ensemble_server.ensembles.base import GenerationRequest, Sampling, collect
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.conftest import WIDE, make_adapter, make_model
from tests.reference import Reference, differences

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

WEIGHTS = {"base": 1, "red": 2, "other": 1}
PROMPT = (5, 9, 40, 7, 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", **WIDE)
    return {
        "base": base,
        "red": make_adapter(root / "red", base, seed=3),
        "other": make_model(root / "other", seed=1, **WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2}),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(folders: dict[str, Path]) -> AsyncIterator[Hosting]:
    models: dict[str, Any] = {name: {"path": str(folders[name]), "dtype": "float32"} for name in ("base", "other")}
    models["red"] = {"base": "base", "adapter": str(folders["red"])}
    models["mix"] = {"method": "probability_average", "members": WEIGHTS, "pool": "posterior", "share": 0.05}
    engine = {"kind": "vllm", "max_batch": 4, "max_context": 128, "kv_cache_gb": 0.1, "tensor_parallel": 2}
    engine["options"] = {"enforce_eager": True}
    config = parse_config({"models": models, "engine": engine}, source=Path("/config.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM wants a NUMA node for each worker
        async with Hosting.open(config) as hosting:
            yield hosting


@pytest.mark.parametrize(
    ("model", "weights", "pool", "share"),
    [("mix", WEIGHTS, "posterior", 0.05), ("red", {"red": 1}, "arithmetic", 0.0)],
)
async def test_two_workers_say_what_one_would(
    hosting: Hosting, folders: dict[str, Path], model: str, weights: dict[str, float], pool: str, share: float
) -> None:
    sampling = Sampling(temperature=0, max_tokens=16, ignore_eos=True)
    answer = await collect(hosting.models[model], GenerationRequest(prompt=PROMPT, sampling=sampling, top_logprobs=3))
    [choice] = answer.choices
    places = {name: (folders[name], None) for name in ("base", "other")} | {"red": (folders["base"], folders["red"])}
    expected, _ = Reference(places, 320)(pool, weights, [*PROMPT, *choice.token_ids], share)
    found = differences(choice, expected[len(PROMPT) - 1 :])
    assert len(found) == 16 * 4
    assert max(found) < 1e-3


async def test_there_are_two_workers(hosting: Hosting) -> None:
    [core] = hosting._engine._model_of["red"].process.llm.engine_core.resources.engine_manager.processes
    titles = [" ".join(child.cmdline()) for child in psutil.Process(core.pid).children(recursive=True)]
    assert sum("Worker_TP" in title for title in titles) == 2, titles
