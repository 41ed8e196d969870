"""The hosted members of a config on vLLM, behind what the server asks of any engine.

Every mixture goes to the vLLM model that holds its members (`placement.py`); which of them count with which weights
travels with the request. What vLLM cannot do is refused by name, before it is queued.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Self

from ensemble_server.ensembles.base import AveragedOver, Event, GenerationRequest, Mixture
from ensemble_server.ensembles.errors import (
    EngineDeadError,
    MemberError,
    ModelLoadError,
    RequestError,
    UnsupportedError,
)
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.engines.engine import Loading, StepStats
from ensemble_server.server.engines.shared import grammar
from ensemble_server.server.engines.shared.reading import RequestReader
from ensemble_server.server.engines.shared.tool_use import ToolUse
from ensemble_server.server.engines.vllm_engine.generation import Prepared, generate
from ensemble_server.server.engines.vllm_engine.model import VllmModel
from ensemble_server.server.engines.vllm_engine.one_prompt import check_one_model
from ensemble_server.server.engines.vllm_engine.parameters import check_supported
from ensemble_server.server.engines.vllm_engine.plan import plan
from ensemble_server.server.engines.vllm_engine.queue import Queue
from ensemble_server.server.weights.member_views import MemberFiles, MemberView
from ensemble_server.server.weights.threads import in_own_thread

logger = logging.getLogger(__name__)


class VllmEngine:
    """Made by `VllmEngine.planned`. Belongs to the event loop that it was made in, but for `start` and `stop`, which
    block and are called from other threads. `views`: how the members read text.
    """

    def __init__(
        self,
        views: Mapping[str, MemberView],
        models: Sequence[VllmModel],
        on_load: Callable[[Loading], None] = lambda loading: None,
    ) -> None:
        self.views = views
        self._models = models
        self._on_load = on_load
        self._model_of = {member: model for model in models for member in model.plan.placement.slots}
        self._ids = itertools.count()
        self._reader = RequestReader(always_writes=True)

    @classmethod
    async def planned(
        cls,
        config: Config,
        *,
        files: MemberFiles | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        on_load: Callable[[Loading], None] = lambda loading: None,
    ) -> Self:
        """For a config with the vllm engine; nothing runs yet. `files`: what has been read of the members already.
        `on_load` is told by `start` of each model before it is started.

        Raises `ModelLoadError`.
        """
        views, plans = await in_own_thread(plan, config, files)
        limits = {"max_running": config.engine.max_batch, "max_waiting": config.server.max_queue}
        return cls(views, [VllmModel(one, Queue(**limits), on_step) for one in plans], on_load)

    @property
    def failure(self) -> str | None:
        """None: what dies is started again, and until then only requests to it are refused."""
        return None

    @property
    def num_restarts(self) -> int:
        return sum(model.process.num_restarts for model in self._models)

    @property
    def down(self) -> frozenset[str]:
        return frozenset(member for member, model in self._model_of.items() if not model.process.is_running)

    def start(self) -> None:
        """Start vLLM for each model, one after the other: each measures how much memory is free. Returns when all are
        ready. Raises `ModelLoadError`.
        """
        for number, model in enumerate(self._models, start=1):
            loading = Loading(model.process.label, number, len(self._models))
            logger.info("%s in vLLM", loading)
            self._on_load(loading)
            model.process.start()

    def stop(self) -> None:
        """End all live generations and vLLM's processes, also if `start` has not returned yet."""
        for model in self._models:
            model.process.stop()

    def check(self, mixture: Mixture) -> None:
        if strangers := set(mixture.weights) - set(self.views):
            raise ModelLoadError(f"no hosted member is called {min(strangers)!r}")
        check_one_model(mixture, [self.views[name] for name in mixture.weights])

    def averages_over(self, mixture: Mixture) -> AveragedOver:
        self.check(mixture)
        return "tokens"

    def ends_thoughts(self, mixture: Mixture) -> bool:
        """In ensembles vLLM knows nothing of their members' thoughts."""
        if not any(self.views[name].surface.thinking for name in mixture.weights):
            return True
        model = self._model_of.get(next(iter(mixture.weights)))
        return model is not None and model.ends_thoughts

    def max_model_len(self, mixture: Mixture) -> int:
        return min(self.views[name].max_model_len for name in mixture.weights)

    async def visit_logprobs(
        self, members: Sequence[str], token_ids: Sequence[int], visit: object, *, priority: int = 1
    ) -> None:
        """Raises `UnsupportedError`: whole distributions do not leave vLLM's processes."""
        raise UnsupportedError(
            "reading whole distributions over a text is not possible with vLLM, whose processes keep them; use "
            "engine.kind transformers for that"
        )

    async def visit_bytes(
        self, members: Sequence[str], text: str, visit: object, *, after: object = None, priority: int = 1
    ) -> None:
        """Raises `UnsupportedError`, as `visit_logprobs` does."""
        await self.visit_logprobs(members, (), visit, priority=priority)

    def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        """See `ensembles.base.MixtureHost`. Raises `OverloadedError` when the queue is full, and its subclass
        `EngineRestartingError` when vLLM is down or goes down before the end.
        """
        first = self.views.get(next(iter(mixture.weights)))
        tools = ToolUse.of(request, first and first.surface)
        return tools.read(self._generated(mixture, tools.request, method))

    async def _generated(self, mixture: Mixture, request: GenerationRequest, method: str) -> AsyncGenerator[Event]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
        from vllm.v1.engine.exceptions import EngineGenerateError

        model = self._model_running(mixture)
        llm = model.process.llm
        model.queue.check_room(request.priority)
        prepared = await asyncio.to_thread(self._prepare, mixture, request, method)
        request_id = f"{request.request_id or 'request'}-{next(self._ids)}"
        open_stream = partial(model.open_stream, llm, prepared, request_id, model.extra_args(mixture))
        try:
            with model.queue.ticket(request.n, request.priority) as ticket:
                async with aclosing(generate(prepared, open_stream, ticket.begin)) as events:
                    async for event in events:
                        yield event
        except VllmDeadError as exc:
            _ = model.process.llm  # raises that it is being started again, or was stopped
            raise EngineDeadError("vLLM died while it worked on this request") from exc
        except VLLMClientError as exc:
            raise RequestError(f"vLLM refuses the request: {exc}", param=getattr(exc, "parameter", None)) from exc
        except EngineGenerateError as exc:
            raise MemberError(prepared.views[0].name, f"vLLM failed on this request ({exc.__cause__!r})") from exc

    def _model_running(self, mixture: Mixture) -> VllmModel:
        name = next(iter(mixture.weights))
        if name not in self._model_of:
            raise UnsupportedError(
                f"model {name!r} is not listed and only lends its weights to adapters, so vLLM does not run it; set "
                "`listed: true` for it",
                param="model",
            )
        return self._model_of[name]

    def _prepare(self, mixture: Mixture, request: GenerationRequest, method: str) -> Prepared:
        """Read the request in the members' terms and check that it can be served. Runs in a worker thread."""
        views = [self.views[name] for name in mixture.weights]
        check_supported(request, mixture)
        reading = self._reader.read(request, views, max_model_len=self.max_model_len(mixture))
        if any(prompt != reading.prompts[0] for prompt in reading.prompts):
            raise UnsupportedError(
                "in vLLM an ensemble is one model that reads one prompt; these members have different views of the "
                "conversation: use engine.kind transformers",
                param="messages",
            )
        if request.max_reasoning_tokens is not None and not self.ends_thoughts(mixture):
            raise UnsupportedError(
                "max_reasoning_tokens: inside an ensemble vLLM cannot end thoughts; ask a model that stands in none, "
                "or use engine.kind transformers",
                param="max_reasoning_tokens",
            )
        if request.sampling.grammar is not None:
            grammar.check(request.sampling.grammar)
        return Prepared(request, mixture, views, reading, method)
