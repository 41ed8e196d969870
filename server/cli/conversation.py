"""A conversation with a model: what was said, and how it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import Delta, Done, Message, Model, Sampling

Show: TypeAlias = Callable[[str, bool], None]  # a piece of text, and whether it is reasoning
ShowExplained: TypeAlias = Callable[["Delta"], None]  # a piece of text with its tokens


class Conversation:
    """What was said so far, with `model`, which may change in between. The system prompt survives a reset.

    `weights` take the place of the configured ones where there are any; they belong to one model.
    """

    def __init__(self, model: Model, system: str | None, sampling: Sampling) -> None:
        self.model = model
        self.system = system
        self.weights: dict[str, float] = {}
        self._sampling = sampling
        self.messages: list[Message] = []

    def reset(self) -> None:
        self.messages = []

    def turn_to(self, model: Model) -> None:
        """Go on with another model, under the weights of its own config."""
        self.model, self.weights = model, {}

    async def ask(self, text: str, show: Show, *, explained: ShowExplained | None = None) -> Done:
        """Pass the answer to `show` as it comes. One that is cut short stays in the conversation as far as it came.

        With `explained` the answer is asked to be explained, and its text goes there instead. Raises what the model
        raises; the question is then as if it had not been asked.
        """
        from ensemble_server.ensembles.base import Delta, Done, GenerationRequest

        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        request = GenerationRequest(
            messages=(*system, *self.messages, question),
            sampling=self._sampling,
            overrides={"weights": dict(self.weights)} if self.weights else {},
            explain=explained is not None,
            top_logprobs=0 if explained is not None and self.model.explains_tokens else None,
        )
        answer = ""
        try:
            async with aclosing(self.model.generate(request)) as events:
                async for event in events:
                    match event:
                        case Delta():
                            if event.reasoning:
                                show(event.reasoning, True)
                            if event.text and explained is not None:
                                explained(event)
                            elif event.text:
                                show(event.text, False)
                            answer += event.text
                        case Done():
                            done = event
        except asyncio.CancelledError:
            self._remember(question, answer)
            raise
        self._remember(question, answer)
        return done

    def _remember(self, question: Message, answer: str) -> None:
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]
