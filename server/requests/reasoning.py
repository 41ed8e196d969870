"""How much a model is to think: one rule, whatever the protocol calls it.

chats       `reasoning_effort`, `thinking`, `max_reasoning_tokens`
responses   `reasoning.effort`, `max_reasoning_tokens`
messages    `output_config.effort`, `thinking`, `max_reasoning_tokens`

A level is told to the templates and remote models that ask for one. It also turns the switch of templates that have
one: "none" and "minimal" off, the others on; `thinking` says that in so many words, and its `budget_tokens` bounds a
thought as `max_reasoning_tokens` does. What is not to be thought and is thought nevertheless is closed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import DistributionModel, wants_thoughts
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.requests.models import speakers_of
from ensemble_server.server.requests.protocol import ChatBody

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

_WHY_UNHEARD = {
    "thinking": "the models here do not think before they answer",
    "thinking.budget_tokens": "thoughts cannot be ended in an average inside vLLM, nor where members are averaged over "
    "text of which the first does not think as others do; ask one member",
    "reasoning_effort": "the models here have no levels of effort; max_reasoning_tokens bounds thoughts, and "
    "chat_template_kwargs tells the template what it knows",
}


@dataclass(frozen=True)
class AskedThoughts:
    """`effort`, `thinks`, `max_tokens`: as in `GenerationRequest`, where the last is `max_reasoning_tokens`. `unheard`:
    parameters of a chat that no model which answers can be told."""

    effort: str | None = None
    thinks: bool | None = None
    max_tokens: int | None = None
    unheard: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `UnsupportedError` for what nobody hears."""
        for name in self.unheard:
            raise UnsupportedError(f"{name} cannot be honoured: {_WHY_UNHEARD[name]}", param=name)


def asked_thoughts(body: ChatBody, hosting: Hosting, model_name: str) -> AskedThoughts:
    effort = body.reasoning_effort
    thinks = {"enabled": True, "disabled": False}.get(body.thinking.type) if body.thinking is not None else None
    limit, unheard = body.reasoning_limit, list[str]()
    speakers = speakers_of(hosting, model_name)
    if thinks and not any(_may_think(surface) for surface in speakers.values()):
        unheard.append("thinking")
    if body.thinking is not None and thinks and limit is None:
        limit = body.thinking.budget_tokens
        if limit is not None and not _can_limit(hosting, speakers):
            unheard.append("thinking.budget_tokens")
            limit = None
    is_level = wants_thoughts(effort, None) is True  # not to think is what models that do not think do
    if is_level and not any(surface is None or surface.thought_settings for surface in speakers.values()):
        unheard.append("reasoning_effort")
    return AskedThoughts(effort, thinks, limit, tuple(unheard))


def _may_think(surface: Surface | None) -> bool:
    return surface is None or surface.thinking is not None or bool(surface.thought_settings)


def _can_limit(hosting: Hosting, speakers: Mapping[str, Surface | None]) -> bool:
    """Whether whoever thinks can be made to end it. Remote models are told, and those that do not think never begin."""
    models = [hosting.models[name] for name in speakers]
    return all(model.host.ends_thoughts(model.mixture) for model in models if isinstance(model, DistributionModel))
