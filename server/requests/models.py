"""How a request's `model` becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import DistributionModel, Model
from ensemble_server.ensembles.errors import ForbiddenModelError, RequestError, UnknownModelError
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.requests.errors import shortened

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface


def requested_model(hosting: Hosting, name: str | None) -> Model:
    """The model a request names; the only listed one if it names none.

    Models that are not listed answer too: they are hidden, not locked. Raises `RequestError`, `UnknownModelError`, or
    `ForbiddenModelError` for one that whoever asks may not use.
    """
    if name is None:
        if len(hosting.listed) != 1:
            raise RequestError(f"model is missing; one of: {', '.join(hosting.listed)}", param="model")
        name = hosting.listed[0]
    if name not in hosting.models:
        raise unknown_model(name, hosting.listed)
    if not hosting.allows(name):
        allowed = ", ".join(hosting.listed)
        raise ForbiddenModelError(f"this key may not use model {name!r}; it may use: {allowed}", param="model")
    return hosting.models[name]


def speakers_of(hosting: Hosting, name: str) -> dict[str, Surface | None]:
    """Of the models that `name` asks, those that write text of their own, with how they write it (None: remote ones).

    A mixture is one: it writes as its first member does.
    """
    model = hosting.models[name]
    others = [member for member in model.members if member != name and member in hosting.models]
    if isinstance(model, DistributionModel) or not others:
        return {name: hosting.surface(name)}
    return {speaker: surface for other in others for speaker, surface in speakers_of(hosting, other).items()}


def unknown_model(name: str, known: Sequence[str]) -> UnknownModelError:
    return UnknownModelError(f"there is no model {shortened(name, 100)!r}{nearest(name[:100], known)}", param="model")
