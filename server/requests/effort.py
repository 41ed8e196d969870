"""How much a model is to think, told to chat templates that know such a setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from ensemble_server.server.weights.view import Surface

TemplateKwargs = dict[str, JsonValue]


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
