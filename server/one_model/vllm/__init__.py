"""An ensemble directory as ONE vLLM model: `vllm serve DIR`, nothing else.

    __init__.py         tells vLLM of the architecture (entry point `vllm.general_plugins`)
    request_mixture.py  what a request may say about its mixture: `ensemble_weights`, `ensemble_pool`, `ensemble_share`
    admission.py        refuses requests that say nonsense
    engine_config.py    what an ensemble changes in vLLM's config, and refuses
    backbone.py         what the model class asks of a backbone
    backbones.py        which members stand on which weights, and how vLLM builds them
    shared_base.py      a backbone that is one base with several LoRA members on it
    model.py            the model class: backbones forward, their distributions are pooled row by row
    rows.py             how a row's weights travel with its hidden states, and the pooling
    evidence.py         the posterior pool's evidence, in pages of vLLM's KV cache
    live_requests.py    the mixtures of the requests in a forward: vLLM's V1 model runner
    worker.py           ... and how the model gets to see that runner
    model_state.py      the same for the V2 model runner

There is one architecture, `EnsembleForCausalLM`. Members of one `path` form one backbone (`backbones.groups`); if any
of them has an adapter, that backbone is a `SharedBase`. Nothing in the directory says so: it follows from `members`.
"""

from __future__ import annotations

ARCHITECTURE = "EnsembleForCausalLM"


def register() -> None:
    """Called by vLLM in each of its processes, some of them several times. Imports no model code."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ensemble_server.server.one_model.configuration import EnsembleConfig
    from ensemble_server.server.one_model.vllm.engine_config import EnsembleEngineConfig

    AutoConfig.register("ensemble", EnsembleConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"ensemble_server.server.one_model.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EnsembleEngineConfig
