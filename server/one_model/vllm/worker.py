"""vLLM's worker of this machine's platform, whose model may look at the requests that it runs (V1 model runner)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ensemble_server.server.one_model.vllm.admission import without_admission
from ensemble_server.server.one_model.vllm.live_requests import RunnerRequests

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_xpu():
    from vllm.v1.worker.xpu_worker import XPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class SeedKeepingWorker(PlatformWorker):
    """vLLM 0.32 draws a token after every chunk of a prompt, throws it away, and turns a seeded request's generator
    back by the draw; generators of CPUs cannot be turned back, and the engine dies. So it gets none for such draws. For
    any model, as `worker_cls`, on CPUs and the V1 runner.
    """

    def init_device(self) -> None:
        super().init_device()
        if current_platform.is_cpu() and not self.use_v2_model_runner:
            self.model_runner.sample_tokens = _without_generators_of_unread(self.model_runner)


class EnsembleWorker(SeedKeepingWorker):
    """Named as `worker_cls` by the hook on vLLM's config (`engine_config.py`)."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # The check at admission is listed as a logits processor. It has no work here, and vLLM would refuse to run
        # with any such while it speculates. The lists of the process that admits requests stay as they are.
        vllm_config = copy.copy(vllm_config)
        vllm_config.model_config = copy.copy(vllm_config.model_config)
        vllm_config.model_config.logits_processors = without_admission(vllm_config.model_config.logits_processors)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        model.follow_requests(RunnerRequests(self.model_runner, model.directory))


def _without_generators_of_unread(runner: GPUModelRunner) -> Callable[[Any], Any]:
    """The runner's `sample_tokens`; requests whose prompt is not read to its end keep their generators untouched."""
    sample_tokens = runner.sample_tokens

    def sample(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        unread = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
        held = {row: generators.pop(row) for row in unread if row in generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            generators.update(held)

    return sample
