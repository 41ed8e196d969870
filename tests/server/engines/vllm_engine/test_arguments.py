"""The config's block in vLLM's terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import VllmEngineConfig
from ensemble_server.server.engines.vllm_engine.arguments import (
    DECIDED_ELSEWHERE,
    RELIED_ON,
    check_options,
    engine_arguments,
    memory_shares,
)
from ensemble_server.server.engines.vllm_engine.directories import ModelFolder
from ensemble_server.server.engines.vllm_engine.placement import Placement, Weights
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.thinking import Markers
from tests.conftest import make_model


def placement_of(*weights: Weights) -> Placement:
    names = [f"m{place}" for place in range(len(weights))]
    return Placement(
        dict(zip(names, weights, strict=True)),
        {name: place for place, name in enumerate(names)},
        Mixture(dict.fromkeys(names, 1.0)),
    )


def arguments_of(
    *weights: Weights,
    is_ensemble: bool = True,
    is_cpu: bool = False,
    memory_share: float = 1.0,
    thinking: Markers | None = None,
    **engine: Any,
) -> dict[str, Any]:
    surface: Any = SimpleNamespace(thinking=thinking)
    placement = placement_of(*(weights or [Weights(Path("/a"), "float32")]))
    views = {
        name: MemberView(name, surface, frozenset(), 100 + 50 * place, 320, 320)
        for name, place in placement.slots.items()
    }
    folder = ModelFolder(Path("/folder"), is_ensemble)
    return engine_arguments(
        VllmEngineConfig(**engine), folder, placement, views, memory_share=memory_share, is_cpu=is_cpu
    )


def test_every_key_arrives() -> None:
    found = arguments_of(
        max_batch=7,
        prefill_chunk=64,
        prefix_caching=False,
        gpu_memory_utilization=0.5,
        kv_cache_gb=2,
        tensor_parallel=2,
        options={"enforce_eager": True},
    )
    assert found == {
        "model": "/folder",
        "dtype": "float32",
        "max_model_len": 100,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 2 * 2**30,
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        **RELIED_ON,
    }


def test_what_is_left_out_is_vllms_choice() -> None:
    assert not {"max_num_batched_tokens", "enable_prefix_caching", "kv_cache_memory_bytes"} & set(arguments_of())


def test_a_step_has_room_for_a_token_of_every_sequence() -> None:
    assert arguments_of(prefill_chunk=16, max_batch=64)["max_num_batched_tokens"] == 64


def test_the_context_is_the_shortest_members() -> None:
    assert arguments_of(Weights(Path("/a"), "auto"), Weights(Path("/b"), "auto"))["max_model_len"] == 100


def test_single_models_on_cpus_survive_seeds() -> None:
    assert "worker_cls" not in arguments_of(is_cpu=True)  # an ensemble's own worker does
    assert arguments_of(is_cpu=True, is_ensemble=False)["worker_cls"].endswith(".SeedKeepingWorker")


def test_vllm_is_told_how_a_single_model_thinks() -> None:
    markers = Markers("<think>", "</think>")
    found = arguments_of(is_ensemble=False, thinking=markers)["reasoning_config"]
    assert found == {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    assert "reasoning_config" not in arguments_of(is_ensemble=False)
    assert "reasoning_config" not in arguments_of(is_ensemble=True, thinking=markers)


def test_members_of_one_model_have_one_dtype() -> None:
    with pytest.raises(ModelLoadError, match=r"'m0' and 'm1' are parts of one vLLM model.*float32 and\s+bfloat16"):
        arguments_of(Weights(Path("/a"), "float32"), Weights(Path("/b"), "bfloat16"))


def test_memory_is_shared_by_the_size_of_the_weights(tmp_path: Path) -> None:
    small = placement_of(Weights(make_model(tmp_path / "small"), "auto"))
    large = placement_of(Weights(make_model(tmp_path / "large", num_hidden_layers=12), "auto"))
    unknown = placement_of(Weights(tmp_path / "nothing", "auto"))
    assert memory_shares([small]) == [1.0]
    first, second = memory_shares([small, large])
    assert first + second == pytest.approx(1) and second > 2 * first
    a, b, c = memory_shares([small, large, unknown])
    assert a + b + c == pytest.approx(1) and b == c
    assert arguments_of(kv_cache_gb=4, memory_share=0.25)["kv_cache_memory_bytes"] == 2**30
    assert arguments_of(memory_share=0.25)["gpu_memory_utilization"] == pytest.approx(0.9 / 4)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("enforce_eagre", "has no argument 'enforce_eagre'; did you mean 'enforce_eager'"),
        ("max_num_seqs", "engine.max_batch says that"),
        ("scheduling_policy", "the server relies on 'priority'"),
    ],
)
def test_options_that_are_not_to_be_set_are_refused(option: str, message: str) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ModelLoadError, match=message):
        check_options(VllmEngineConfig(options={option: 1}))


@pytest.mark.vllm
def test_all_that_is_decided_here_are_arguments_of_vllm() -> None:
    """They may be renamed in a new version."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(DECIDED_ELSEWHERE) | set(RELIED_ON) | {"worker_cls"} <= known
