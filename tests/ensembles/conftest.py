"""Members for tests of text-level methods: they say what they are told to, and remember what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    FinishReason,
    GenerationRequest,
    MemberUsage,
    Model,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from ensemble_server.ensembles.method import Method, Services
from ensemble_server.ensembles.registry import method_class

Speech = str | Exception | Sequence[ToolCall] | Callable[[GenerationRequest], str]


@dataclass
class Talker:
    """Its k-th call gives the k-th of `speeches` (then the last again): a text, an error, calls of tools, or a function
    of the request.

    Each call reads 10 tokens and writes one per word. `delay_s`: how long a call takes; infinity never answers.
    """

    name: str
    speeches: Sequence[Speech]
    delay_s: float = 0.0
    finish_reason: FinishReason = "stop"
    max_model_len: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    num_running: int = 0
    num_broken_off: int = 0
    explains_tokens: bool = False
    fan_out: int = 1

    @property
    def members(self) -> tuple[str, ...]:
        return (self.name,)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        speech = self.speeches[min(len(self.requests), len(self.speeches) - 1)]
        self.requests.append(request)
        self.num_running += 1
        is_done = False
        try:
            await (asyncio.Event().wait() if self.delay_s == float("inf") else asyncio.sleep(self.delay_s))
            if isinstance(speech, Exception):
                raise speech
            text = speech(request) if callable(speech) else "" if isinstance(speech, list) else speech
            calls = speech if isinstance(speech, list) else []
            words = text.split(" ")
            for index in range(request.n):
                for position, word in enumerate(words):
                    is_last = position == len(words) - 1
                    yield Delta(
                        index,
                        word if is_last else f"{word} ",
                        token_ids=(position,),
                        finish_reason=self.finish_reason if is_last else None,
                        calls=tuple(
                            ToolCallDelta(place, call.name, call.arguments, call.id) for place, call in enumerate(calls)
                        ),
                    )
            usage = MemberUsage(10, len(words) * request.n)
            yield Done(Usage(10, len(words) * request.n, {self.name: usage}), "member", (self.name,), 1)
            is_done = True
        finally:
            self.num_running -= 1
            self.num_broken_off += not is_done and not isinstance(speech, Exception)


class LetterEmbedder:
    """Embeds a text as its counts of the letters a to z, so that similarities can be worked out by hand."""

    name = "letters"

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        counts = counts.reshape(len(texts), 26).astype(np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def talker() -> Callable[..., Talker]:
    """talker("ann", "one answer", "the next answer", delay_s=0.1)"""
    return lambda name, *speeches, **kwargs: Talker(name, speeches, **kwargs)


@pytest.fixture
def letter_embedder() -> LetterEmbedder:
    return LetterEmbedder()


@pytest.fixture
def compose(letter_embedder: LetterEmbedder) -> Callable[..., Method]:
    """compose({"method": "crowd_vote", ...}, [ann, bob]): the method under its config, named "crowd"."""

    def compose(config: Mapping[str, Any], models: Sequence[Model], *, name: str = "crowd") -> Method:
        cls = method_class(config["method"])
        parsed = cls.Config.model_validate({"members": [model.name for model in models], **config})
        return cls(name, parsed, {model.name: model for model in models}, Services(embedder=letter_embedder))

    return compose
