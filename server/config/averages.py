"""Which model of a config is a probability average: told of a name before anything heavy is imported for it."""

from __future__ import annotations

from ensemble_server.ensembles.errors import ConfigError, UnknownModelError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.config.blocks import Config, ModelEntry
from ensemble_server.server.config.problems import nearest


def model_named(config: Config, name: str, *, param: str) -> ModelEntry:
    """Raises `UnknownModelError` if `name` is no model of `config`; it says which probability average is nearest."""
    entry = config.models.get(name)
    if entry is None:
        known = [one for one, model in config.models.items() if isinstance(model, ProbabilityAverage.Config)]
        raise UnknownModelError(f"there is no model {name!r}{nearest(name, known)}", param=param)
    return entry


def average_of(config: Config, name: str) -> ProbabilityAverage.Config:
    """Raises `ConfigError` if `name` is no model of `config`, or one that gives no next-token distributions."""
    ensemble = config.models.get(name)
    if ensemble is None:
        raise ConfigError(f"{config.source}: there is no model {name!r}{nearest(name, config.models)}")
    if not isinstance(ensemble, ProbabilityAverage.Config):
        raise ConfigError(
            f"model {name!r} is no probability_average: only ensembles of next-token distributions are one model; "
            "text-level ones are served by `ensemble serve`"
        )
    return ensemble
