"""What `ensemble serve` and `ensemble chat` are pointed at: one config, or models without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import load_config

YAML_ENDINGS = {".yaml", ".yml"}


def is_config(target: str) -> bool:
    """Whether a target is a YAML file, there or not: any other file but a GGUF is taken for one, too."""
    path = Path(target)
    return path.suffix.lower() in YAML_ENDINGS or (path.is_file() and path.suffix != ".gguf")


def config_of(targets: Sequence[str], *, api_key_env: str | None = None) -> Config:
    """The config that the one target is, or one made for the models that they are, in memory.

    Raises `ConfigError` if it cannot be had. Blocks: models that are given by hub id are downloaded.
    """
    if len(targets) == 1 and is_config(targets[0]):
        return load_config(Path(targets[0]))
    if configs := [target for target in targets if is_config(target)]:
        raise ConfigError(
            f"{configs[0]!r} is a config, which is served alone; put what else is wanted into it, or give models only"
        )
    from ensemble_server.server.proposal.machine import this_machine
    from ensemble_server.server.proposal.proposal import propose
    from ensemble_server.server.proposal.sources import entries_of

    source = Path("ensemble.yaml").absolute()
    entries = entries_of(targets, folder=source.parent, api_key_env=api_key_env)
    return propose(entries, source=source, machine=this_machine(hosts=bool(entries.hosted))).as_config(source)
