"""The config's `engine:` block in vLLM's terms, and how several vLLM models share one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import VllmEngineConfig
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.engines.vllm_engine.directories import ModelFolder
from ensemble_server.server.engines.vllm_engine.placement import Placement
from ensemble_server.server.weights.footprint import read_weights
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.thinking import Markers

MAX_LOGPROBS = 20  # the API's own limit
# Arguments of vLLM that other keys of the config decide, or that this engine relies on.
DECIDED_ELSEWHERE = {
    "model": "models",
    "tokenizer": "models",
    "dtype": "models.NAME.dtype",
    "max_model_len": "engine.max_context",
    "max_num_seqs": "engine.max_batch",
    "max_num_batched_tokens": "engine.prefill_chunk",
    "enable_prefix_caching": "engine.prefix_caching",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_gb",
    "tensor_parallel_size": "engine.tensor_parallel",
    "reasoning_config": "models.NAME.reasoning",
}
RELIED_ON: Mapping[str, Any] = {
    "scheduling_policy": "priority",
    "structured_outputs_config": {"backend": "guidance"},  # the library that checks grammars before they are queued
    "max_logprobs": MAX_LOGPROBS,
    "logprobs_mode": "raw_logprobs",
    "disable_log_stats": True,
    "enable_log_requests": False,
}


def engine_arguments(
    engine: VllmEngineConfig,
    folder: ModelFolder,
    placement: Placement,
    views: Mapping[str, MemberView],
    *,
    memory_share: float,
    is_cpu: bool,
) -> dict[str, Any]:
    """Keyword arguments for vLLM's `AsyncEngineArgs`. `memory_share`: the model's part of the config's memory, of 1;
    `is_cpu`: whether vLLM runs on CPUs here. Raises `ModelLoadError` for members whose dtypes differ.
    """
    arguments = {
        "model": str(folder.path),
        "dtype": _dtype(placement),
        "max_model_len": min(views[member].max_model_len for member in placement.slots),
        "max_num_seqs": engine.max_batch,
        "gpu_memory_utilization": engine.gpu_memory_utilization * memory_share,
        "tensor_parallel_size": engine.tensor_parallel,
        **RELIED_ON,
    }
    if engine.prefill_chunk is not None:
        arguments["max_num_batched_tokens"] = max(engine.prefill_chunk, engine.max_batch)  # a token for each at least
    if not engine.prefix_caching:
        arguments["enable_prefix_caching"] = False
    if engine.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gb * memory_share * 2**30)
    if is_cpu and not folder.is_ensemble:
        arguments["worker_cls"] = "ensemble_server.server.one_model.vllm.worker.SeedKeepingWorker"  # ensembles have it
    if (markers := markers_that_end(folder, placement, views)) is not None:
        arguments["reasoning_config"] = {"reasoning_start_str": markers.start, "reasoning_end_str": markers.end}
    return arguments | engine.options


def markers_that_end(folder: ModelFolder, placement: Placement, views: Mapping[str, MemberView]) -> Markers | None:
    """Of the thoughts that vLLM can be told to end. None where nobody thinks, where views of the same weights do so in
    different ways, and in ensembles, whose members' distributions vLLM knows nothing of."""
    found = {markers for member in placement.slots if (markers := views[member].surface.thinking) is not None}
    return next(iter(found)) if len(found) == 1 and not folder.is_ensemble else None


def check_options(engine: VllmEngineConfig) -> None:
    """Raises `ModelLoadError` for options that vLLM does not have, or that are not to be set there."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    for option in engine.options:
        if option in DECIDED_ELSEWHERE:
            raise ModelLoadError(f"engine.options.{option}: {DECIDED_ELSEWHERE[option]} says that; remove it here")
        if option in RELIED_ON:
            raise ModelLoadError(f"engine.options.{option}: the server relies on {RELIED_ON[option]!r}; remove it here")
        if option not in known:
            close = nearest(option, known).partition(" (known:")[0]  # there are hundreds
            raise ModelLoadError(f"engine.options: vLLM's engine has no argument {option!r}{close}")


def memory_shares(all_placements: Sequence[Placement]) -> list[float]:
    """Which part of the memory each vLLM model gets: in proportion to its weights, since larger models have larger
    caches, too. Weights that cannot be measured (not safetensors) count as the largest that can.
    """
    if len(all_placements) == 1:
        return [1.0]
    sizes = [_weights_bytes(placement) for placement in all_placements]
    largest = max((size for size in sizes if size is not None), default=1)
    counted = [largest if size is None else size for size in sizes]
    return [size / sum(counted) for size in counted]


def _weights_bytes(placement: Placement) -> int | None:
    checkpoints = {weights.checkpoint: weights.dtype for weights in placement.parts.values()}
    try:
        return sum(read_weights(folder).bytes_as(dtype) for folder, dtype in checkpoints.items())
    except ModelLoadError:
        return None


def _dtype(placement: Placement) -> str:
    dtypes = {weights.dtype: name for name, weights in placement.parts.items()}
    if len(dtypes) > 1:
        (first, name), (second, other), *_ = dtypes.items()
        raise ModelLoadError(
            f"models {name!r} and {other!r} are parts of one vLLM model, which has one dtype; they ask for {first} and "
            f"{second}: give them the same"
        )
    return next(iter(dtypes))
