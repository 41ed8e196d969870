"""What an ensemble changes in vLLM's config, and what it refuses by name; once per engine, at its start."""

from __future__ import annotations

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ensemble_server.server.one_model.vllm.admission import admission_name
from ensemble_server.server.one_model.vllm.request_mixture import Directory

WORKER = "ensemble_server.server.one_model.vllm.worker.EnsembleWorker"
# Draft heads are trained on the hidden states of one model; an ensemble has none of its own to show them.
SPECULATION = ("ngram", "ngram_gpu", "draft_model", "suffix")


class EnsembleEngineConfig(VerifyAndUpdateConfig):
    """Registered for the architecture in `__init__.py`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises `ValueError` for settings under which an ensemble cannot be exact."""
        model_config = vllm_config.model_config
        _refuse(vllm_config)
        directory = Directory.of(model_config.hf_config)
        is_v2 = vllm_config.use_v2_model_runner
        listed = list(model_config.logits_processors or [])
        model_config.logits_processors = [*listed, admission_name(directory, is_v2_runner=is_v2)]
        if not is_v2:
            _use_own_worker(vllm_config)


def _refuse(vllm_config: VllmConfig) -> None:
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in SPECULATION:
        raise ValueError(
            f"speculative method {speculation.method!r} reads the hidden states of one model, which an ensemble has "
            f"not; use one of {', '.join(SPECULATION)} (a member may be the draft model)"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            "--enable-prompt-embeds: members have different embeddings, so an ensemble takes token ids only"
        )
    if vllm_config.parallel_config.enable_dbo:
        raise ValueError("--enable-dbo: an ensemble looks up the request of each row, which split batches do not tell")


def _use_own_worker(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", WORKER):
        raise ValueError(
            f"--worker-cls {parallel.worker_cls}: an ensemble has a worker of its own on this model runner"
        )
    parallel.worker_cls = WORKER
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        # On this runner the weights of requests are looked up in Python; a graph of a whole forward would freeze them.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
