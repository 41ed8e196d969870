"""vLLM's worker of this machine's platform, whose model may look at the requests that it runs (V1 model runner)."""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from server.one_model.vllm.admission import without_admission
from server.one_model.vllm.live_requests import RunnerRequests

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_xpu():
    from vllm.v1.worker.xpu_worker import XPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class EnsembleWorker(PlatformWorker):
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
