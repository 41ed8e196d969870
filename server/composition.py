"""Models made of models: a hosted member alone, and ensembles built after everything that they refer to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from graphlib import TopologicalSorter

from ensemble_server.ensembles.base import Event, GenerationRequest, Mixture, MixtureHost, Model
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.ensembles.probability_averaging import overridden
from ensemble_server.ensembles.registry import method_class


class SingleMember:
    """One hosted member as a model of its own: the mixture of it alone."""

    explains_tokens = True
    fan_out = 1

    def __init__(self, name: str, host: MixtureHost) -> None:
        self.name = name
        self.members: tuple[str, ...] = (name,)
        self.host = host
        self.mixture = Mixture({name: 1.0})
        self.max_model_len: int | None = host.max_model_len(self.mixture)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        mixture = overridden(self.mixture, self.members, request.overrides)
        return self.host.generate(mixture, request, method="member")


def compose(
    methods: Mapping[str, MethodConfig],
    parts: Mapping[str, Model],
    services: Services,
    *,
    failures: dict[str, ModelLoadError] | None = None,
) -> dict[str, Model]:
    """`parts`, and every ensemble of `methods`, built after those that it refers to.

    Raises `ModelLoadError` for one that its method refuses. With `failures`, that is noted there under the ensemble's
    name instead, and those that need it, or a part that is missing, are left out.
    """
    models: dict[str, Model] = dict(parts)
    for name in TopologicalSorter({name: entry.references() for name, entry in methods.items()}).static_order():
        if name not in methods:
            continue
        entry = methods[name]
        if failures is not None and not entry.references() <= set(models):
            continue
        cls: type[Method] = method_class(entry.method)
        try:
            models[name] = cls(name, entry, {part: models[part] for part in entry.references()}, services)
        except ModelLoadError as exc:
            if failures is None:
                raise
            failures[name] = exc
    return models
