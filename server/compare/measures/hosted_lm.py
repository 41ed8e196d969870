"""A hosted model as lm-evaluation-harness knows models: likelihoods of continuations, and generations.

The harness calls from a thread of its own and waits there; `Link` carries its questions into the event loop, where
models answer, several at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ensemble_server.ensembles.base import DistributionModel, GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import EngineDeadError, EnsembleError, UnsupportedError
from ensemble_server.ensembles.text_level import derived_seed
from ensemble_server.server.compare.measures.byte_scores import is_over_bytes, score_bytes

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 256  # of a generation whose task does not say; the harness's own default
SAMPLING_KEYS = {  # of a task's generation_kwargs, and what they are called here
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


class Link:
    """From the harness's thread into the event loop, where models answer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        places: asyncio.Semaphore,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._loop, self._places, self._on_progress = loop, places, on_progress
        self._done = self._asked = 0
        self._is_cancelled = False
        self._running: Future[Any] | None = None

    def run(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """All calls, some at a time, in the order given; from the harness's thread."""
        self._running = asyncio.run_coroutine_threadsafe(self._all(calls), self._loop)
        if self._is_cancelled:
            self._running.cancel()
        return self._running.result()

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._running is not None:
            self._running.cancel()

    async def _all(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        self._asked += len(calls)

        async def one(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with self._places:
                result = await call()
            self._done += 1
            if self._on_progress is not None:
                self._on_progress(self._done, self._asked)
            return result

        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(one(call)) for call in calls]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in running]


@dataclass
class Answers:
    """What a model gives the harness, one request at a time. `errors`: (task, number of the item) -> what failed."""

    hosting: Hosting
    model_name: str
    seed: int
    priority: int
    errors: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def surface(self) -> Surface:
        surface = self.hosting.surface(self.model_name)
        if surface is None or not isinstance(self.hosting.models[self.model_name], DistributionModel):
            raise UnsupportedError(f"model {self.model_name!r} gives text, not probabilities, which this task needs")
        return surface

    async def likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Nats of the continuation, and whether each of its tokens (or bytes) was the most likely one."""
        model = self.hosting.models[self.model_name]
        if isinstance(model, DistributionModel) and is_over_bytes(model):
            return await self._byte_likelihood(model, context, continuation)
        token_ids = (*context, *continuation)[-(model.max_model_len or 0) :]
        request = GenerationRequest(
            prompt=token_ids, prompt_logprobs=1, sampling=Sampling(max_tokens=0), priority=self.priority
        )
        prompt = (await collect(model, request)).prompt
        assert prompt is not None, "a hosted model says how it read the prompt"
        scored = prompt.tokens[max(1, len(token_ids) - len(continuation)) :]
        nats = sum(token.logprob for token in scored if token.logprob is not None)
        return nats, all(token.top[0].token_id == token.token_id for token in scored)

    async def _byte_likelihood(
        self, model: DistributionModel, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, bool]:
        """`likelihood` for members of different vocabularies: what the tokens of the first one spell is scored."""
        surface = self.surface
        ids = [*context, *continuation][-(model.max_model_len or 0) :]
        text = surface.decode([token_id for token_id in ids if token_id not in surface.special_ids])
        scored = surface.decode([token_id for token_id in continuation if token_id not in surface.special_ids])
        scores = await score_bytes(model, text, priority=self.priority)
        num_bytes = len(scored.encode())
        if len(scores.logprobs) < num_bytes:
            raise UnsupportedError(
                f"the members of {self.model_name!r} have different vocabularies and share no token that could stand "
                "before a text, so its first word has no likelihood; rolling likelihoods need one: measure bits per "
                "byte with the texts of a comparison"
            )
        at = len(scores.logprobs) - num_bytes
        return float(scores.logprobs[at:].sum()), bool(scores.is_likeliest[at:].all())

    async def generation(self, task: str, item: int, prompt: str, settings: Mapping[str, Any]) -> str:
        model = self.hosting.models[self.model_name]
        max_tokens = settings.get("max_gen_toks") or DEFAULT_MAX_TOKENS
        sampling = _sampling(settings, max_tokens, derived_seed(self.seed, task, item))
        room = None
        if isinstance(model, DistributionModel):
            assert model.max_model_len is not None, "a hosted model knows its context"
            room = max(1, model.max_model_len - max_tokens)
        request = GenerationRequest(
            prompt=prompt, sampling=sampling, truncate_prompt_tokens=room, priority=self.priority
        )
        try:
            return (await collect(model, request)).text
        except (UnsupportedError, EngineDeadError):
            raise
        except EnsembleError as exc:
            self.errors.setdefault((task, item), str(exc))
            return ""


def _sampling(settings: Mapping[str, Any], max_tokens: int, seed: int | None) -> Sampling:
    """A task's generation_kwargs, normalised by the harness, as a request says it. Raises `UnsupportedError`."""
    settings = {key: value for key, value in settings.items() if value is not None}
    until, _, is_sampled = (settings.pop(key, None) for key in ("until", "max_gen_toks", "do_sample"))
    if unknown := sorted(set(settings) - set(SAMPLING_KEYS)):
        raise UnsupportedError(f"generation_kwargs.{unknown[0]} of this task cannot be honoured")
    chosen = {SAMPLING_KEYS[key]: value for key, value in settings.items()}
    if not is_sampled:
        chosen["temperature"] = 0.0
    return Sampling(
        max_tokens=max_tokens,
        stop=tuple(stop for stop in until or () if stop),
        seed=seed,
        **chosen,
    )


def hosted_lm(answers: Answers, link: Link) -> Any:
    """The model as the harness knows models. Made here because its base class takes seconds to import."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class HostedLM(TemplateLM):
        @property
        def eot_token_id(self) -> Any:  # an id, or what else a tokenizer may have; transformers leaves it open
            return answers.surface.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> Any:
            first = answers.surface.tokenizer.bos_token_id
            return self.eot_token_id if first is None else first

        @property
        def max_length(self) -> int:
            length = answers.hosting.models[answers.model_name].max_model_len
            assert length is not None, "a hosted model knows its context"
            return length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return answers.surface.encode(string, add_special_tokens=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return link.run(
                [
                    lambda context=context, continuation=continuation: answers.likelihood(context, continuation)
                    for _, context, continuation in requests
                ]
            )

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    self.prefix_token_id,
                    self.max_length - 1,  # a window is scored with the token before it
                    1,
                )
                pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pieces)))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return link.run(
                [
                    lambda request=request: answers.generation(
                        request.task_name,
                        request.doc_id,
                        request.args[0],
                        normalize_gen_kwargs(request.args[1], DEFAULT_MAX_TOKENS),
                    )
                    for request in requests
                ]
            )

    return HostedLM()
