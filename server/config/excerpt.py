"""The part of a config that some of its models need, so that nothing else is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.config.blocks import Config, HostedModel


def closure(config: Config, names: Iterable[str]) -> list[str]:
    """These models and all that they refer to, in the config's order."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        entry = config.models[name]
        if isinstance(entry, MethodConfig):
            waiting += entry.references()
        elif isinstance(entry, HostedModel) and entry.base is not None:
            waiting.append(entry.base)
    return [name for name in config.models if name in found]


def excerpt(config: Config, names: Iterable[str]) -> Config:
    """The config with these models and what they refer to, so that nothing else is loaded."""
    return config.model_copy(update={"models": {name: config.models[name] for name in closure(config, names)}})
