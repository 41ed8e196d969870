"""Which members a gate was trained for: a digest of what their entries say of their weights. Loads nothing.

So a gate is refused for members that are others, under whatever name. What is not noticed is a folder that holds other
weights than it did: for that files would have to be read whenever a config is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.config.blocks import HostedModel, ModelEntry

OF_WEIGHTS = ("path", "revision", "adapter", "delta", "dtype")


def identity(models: Mapping[str, ModelEntry], name: str, folder: Path) -> str:
    """Of the hosted model `name`: 12 hex digits. Paths count from `folder`, so a config may move with what it names."""
    entry = models[name]
    assert isinstance(entry, HostedModel), "members of an average are hosted"
    chain = [entry] if entry.base is None else [entry, models[entry.base]]
    said = [{"system_prompt": entry.system_prompt}]
    for part in chain:
        values = {key: getattr(part, key) for key in OF_WEIGHTS}
        said.append({key: _from(folder, value) for key, value in values.items() if value is not None})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def gate_problems(models: Mapping[str, ModelEntry], folder: Path) -> Iterator[str]:
    """Averages whose gate was trained for other members than those that have their names here."""
    for name, entry in models.items():
        if not isinstance(entry, ProbabilityAverage.Config) or entry.gate is None:
            continue
        for member, trained in entry.gate.members.items():
            if isinstance(models.get(member), HostedModel) and identity(models, member, folder) != trained.identity:
                yield (
                    f"models.{name}.gate: was trained for other weights than {member!r} has here; train it again with "
                    "`ensemble fit --gate`, or leave it out"
                )


def _from(folder: Path, value: str) -> str:
    return os.path.relpath(value, folder) if os.path.isabs(value) else value
