"""How much a model should think, as far as it can be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import JsonValue

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.requests.models import speakers_of
from ensemble_server.server.requests.protocol import ChatBody

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

TemplateKwargs = dict[str, JsonValue]


def reasoning_effort(body: ChatBody, hosting: Hosting, model_name: str) -> str | None:
    """Raises `UnsupportedError` for a level that no model which answers knows. Remote ones may know it."""
    effort = body.reasoning_effort
    if effort in (None, "none"):
        return effort
    for surface in speakers_of(hosting, model_name).values():
        if surface is None or "reasoning_effort" in (surface.chat_template or ""):
            return effort
    raise UnsupportedError(
        "reasoning_effort cannot be honoured: the models here have no levels of effort; max_reasoning_tokens bounds "
        "thoughts, and chat_template_kwargs tells the template what it knows",
        param="reasoning_effort",
    )


def effort_kwargs(surface: Surface | None, effort: str | None, *, thinks: bool | None = None) -> TemplateKwargs | None:
    """What to tell the template of a model; None if it has no such setting, so that the wish is ignored.

    `effort`: a level, as OpenAI and Anthropic name them. `thinks`: whether to think at all; where it is None, "none"
    and "minimal" say no.
    """
    template = (surface.chat_template if surface is not None else None) or ""
    kwargs: TemplateKwargs = {}
    if thinks is None and effort is not None:
        thinks = effort not in ("none", "minimal")
    if thinks is not None and "enable_thinking" in template:
        kwargs["enable_thinking"] = thinks
    if effort is not None and "reasoning_effort" in template:
        kwargs["reasoning_effort"] = effort
    return kwargs or None
