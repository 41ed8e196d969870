"""vLLM's worker for CPUs, for models that are no ensemble (those have `server.one_model.vllm.worker`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from server.one_model.vllm.cpu_seeds import spare_generators


class SeededCPUWorker(CPUWorker):
    """One whose requests may have a seed and a long prompt."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        spare_generators(self.model_runner)
