"""A vLLM model that runs some members of a config: what to start, and how a mixture is told to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.vllm_engine.generation import Prepared
from ensemble_server.server.engines.vllm_engine.parameters import sampling_params
from ensemble_server.server.engines.vllm_engine.plan import Plan
from ensemble_server.server.engines.vllm_engine.process import VllmProcess
from ensemble_server.server.engines.vllm_engine.queue import Queue
from ensemble_server.server.engines.vllm_engine.step_stats import StepClock, stat_logger
from ensemble_server.server.one_model.vllm.request_mixture import POOL, SHARE, WEIGHTS, Directory

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmModel:
    """Made in the event loop that its requests run in. `process` is still to be started."""

    def __init__(self, plan: Plan, queue: Queue, on_step: Callable[[StepStats], None] | None) -> None:
        self.plan = plan
        self.queue = queue
        self.clock = StepClock()
        self._on_step = on_step
        self.process = VllmProcess(", ".join(plan.placement.slots), self._make, _warm)
        own = plan.placement.mixture
        present = {part: weight for part, weight in own.weights.items() if weight}
        self._directory = Directory(tuple(plan.placement.parts), Mixture(present, own.pool, own.share))

    @property
    def ends_thoughts(self) -> bool:
        """Whether vLLM can be told how long a thought may be."""
        return "reasoning_config" in self.plan.arguments

    def extra_args(self, mixture: Mixture) -> dict[str, Any] | None:
        """What makes vLLM run `mixture` for a request. Raises `UnsupportedError` for one that this model cannot run."""
        if not self.plan.folder.is_ensemble:
            return None
        parts = self.plan.placement.mixture_of_parts(mixture)
        asked: dict[str, Any] = {WEIGHTS: list(parts.weights.values()), POOL: parts.pool}
        if parts.pool == "posterior":
            asked[SHARE] = parts.share
        try:
            self._directory.of_request(asked)
        except ValueError as exc:
            key = next((key for key in (WEIGHTS, POOL, SHARE) if str(exc).startswith(key)), WEIGHTS)
            message = str(exc).replace("ensemble_", "ensemble.")  # our clients' names for the keys
            raise UnsupportedError(f"vLLM cannot: {message}", param=key.replace("_", ".", 1)) from exc
        return asked

    def open_stream(
        self, llm: AsyncLLM, prepared: Prepared, request_id: str, extra_args: dict[str, Any] | None, index: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's outputs for choice `index` of a request."""
        from vllm.inputs import tokens_input

        params = sampling_params(
            prepared.request,
            index,
            max_new_tokens=prepared.max_new_tokens,
            eos_ids=prepared.eos_ids,
            vocab_size=prepared.vocab_size,
            extra_args=extra_args,
            max_thought_tokens=prepared.max_thought_tokens if self.ends_thoughts else None,
        )
        self.clock.request_came()
        return llm.generate(
            tokens_input(prepared.token_ids), params, f"{request_id}-{index}", priority=prepared.request.priority
        )

    def _make(self) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        members = tuple(self.plan.placement.slots)
        loggers = [] if self._on_step is None else [stat_logger(members, self.clock, self._on_step)]
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**self.plan.arguments), stat_loggers=loggers)


async def _warm(llm: AsyncLLM) -> None:
    """One token of everything that vLLM compiles when it is first asked for: kernels, ranks of log-probabilities."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    async for _ in llm.generate(tokens_input([0, 0]), params, "warm-up"):
        pass
