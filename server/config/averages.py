"""Which model of a config is a probability average: told of a name before anything heavy is imported for it."""

from __future__ import annotations

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.problems import nearest


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
