"""Which models are loaded together when one member at a time is in memory, and which ensembles cannot work that way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.exchange_of_thought import ExchangeOfThought
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.ensembles.routing import Routing
from ensemble_server.server.config.blocks import Config, RemoteModel

_REFUSED = {
    ExchangeOfThought.Config: "its members answer each other, so every round would load all of them again",
    Routing.Config: "which member a row asks next depends on how the one before did",
}


@dataclass(frozen=True)
class Phase:
    """Models that are loaded together. `weights`: the entries whose weights they stand on; none for remote ones."""

    models: tuple[str, ...]
    weights: tuple[str, ...]


def check_can_be_sequential(config: Config, name: str) -> None:
    """Raise `ConfigError` with the reason if model `name` needs its members in memory at the same time."""
    entry = config.models[name]
    if isinstance(entry, ProbabilityAverage.Config) and len(_weights_of(config, name)) > 1:
        raise ConfigError(
            f"model {name!r} averages its members' next-token distributions at every token, so all of them must be in "
            "memory at the same time; keep --residency resident, or vote among their texts (crowd_vote, majority)"
        )
    for name_, part in composed(config, name).items():
        for cls, reason in _REFUSED.items():
            if isinstance(part, cls):
                raise ConfigError(
                    f"model {name_!r} ({part.method}) cannot run member by member: {reason}; keep --residency resident"
                )


def composed(config: Config, name: str) -> dict[str, MethodConfig]:
    """The ensembles of texts that `name` is made of, itself among them."""
    entry = config.models[name]
    if not isinstance(entry, MethodConfig) or isinstance(entry, ProbabilityAverage.Config):
        return {}
    inner = {found: part for other in sorted(entry.references()) for found, part in composed(config, other).items()}
    return {name: entry, **inner}


def singles(config: Config, names: Iterable[str]) -> tuple[str, ...]:
    """The models at the bottom that answer by themselves, in the config's order."""
    found = set()
    for name in names:
        ensembles = composed(config, name)
        found |= {part for entry in ensembles.values() for part in entry.references() if part not in ensembles}
        if not ensembles:
            found.add(name)
    return tuple(name for name in config.models if name in found and not composed(config, name))


def _weights_of(config: Config, name: str) -> tuple[str, ...]:
    """The entries with weights that a model stands on."""
    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return tuple(sorted({root for member in entry.references() for root in _weights_of(config, member)}))
    return () if isinstance(entry, RemoteModel) else (entry.base or name,)


def phases(config: Config, names: Iterable[str]) -> tuple[Phase, ...]:
    """What is loaded for models `names`, one after the other: an average of several members counts as one."""
    by_weights: dict[tuple[str, ...], list[str]] = {}
    for single in singles(config, names):
        by_weights.setdefault(_weights_of(config, single), []).append(single)
    return tuple(Phase(tuple(models), weights) for weights, models in by_weights.items())
