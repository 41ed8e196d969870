"""vLLM's own counts as the server's metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ensemble_server.server.engines.engine import StepStats

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import StatLoggerFactory
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class StepClock:
    """How long steps take. vLLM reports that one has ended, not when it began: that is when the one before ended, or
    when the request came that woke it.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._is_idle = True

    def request_came(self) -> None:
        if self._is_idle:
            self._began, self._is_idle = time.perf_counter(), False

    def step_ended(self, *, is_idle: bool) -> float:
        """Seconds that the step took. `is_idle`: nothing is left to do."""
        now = time.perf_counter()
        duration_s, self._began, self._is_idle = now - self._began, now, is_idle
        return duration_s


def stat_logger(members: Sequence[str], clock: StepClock, on_step: Callable[[StepStats], None]) -> StatLoggerFactory:
    """For `AsyncLLM(stat_loggers=[...])`. vLLM runs all members for every row of their model."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepReport(StatLoggerBase):
        def __init__(self, vllm_config: object, engine_index: int = 0) -> None:
            """vLLM makes one per engine."""

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: object = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is None:
                return
            num_running: int = scheduler_stats.num_running_reqs
            num_waiting: int = scheduler_stats.num_waiting_reqs
            num_tokens: int = 0
            num_cached: int = 0
            if iteration_stats is not None:
                prompts = iteration_stats.prompt_token_stats
                num_tokens = prompts.computed + iteration_stats.num_generation_tokens
                num_cached = prompts.cached_tokens
            on_step(
                StepStats(
                    clock.step_ended(is_idle=not num_running + num_waiting),
                    num_running,
                    num_waiting,
                    num_rows=dict.fromkeys(members, num_running),
                    num_tokens=dict.fromkeys(members, num_tokens),
                    num_cached_tokens=dict.fromkeys(members, num_cached) if num_cached else {},
                )
            )

        def log_engine_initialized(self) -> None:
            """Nothing to log."""

    return StepReport
