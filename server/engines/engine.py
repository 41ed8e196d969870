"""What the server asks of an engine: a `MixtureHost` that can be started, watched and stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ensemble_server.ensembles.base import MixtureHost


@dataclass(frozen=True)
class StepStats:
    """One step of the engine, for metrics. `num_rows`: rows (one per request and member) that each member forwarded;
    `num_tokens`: tokens, prompt and generated, that it forwarded; `num_cached_tokens`: prompt tokens that it did not
    have to, since the prefix cache, which now holds `prefix_cache_bytes`, knew them; `num_restarts`: how often members
    that are averaged over text could not write it, and began anew. `kv_cache_bytes`: of the caches of all that runs,
    what they share counted once; 0 where that is not known. `num_drafted`: tokens that choices had their members read
    ahead, by where the drafts came from, and `num_accepted` of them that were then drawn."""

    duration_s: float
    num_running: int
    num_waiting: int
    num_rows: Mapping[str, int]
    num_tokens: Mapping[str, int]
    num_cached_tokens: Mapping[str, int] = field(default_factory=dict)
    prefix_cache_bytes: int = 0
    num_restarts: Mapping[str, int] = field(default_factory=dict)
    kv_cache_bytes: int = 0
    num_drafted: Mapping[str, int] = field(default_factory=dict)
    num_accepted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loading:
    """Weights that are loaded next. `number`: from 1 to `total`, those of the config; adapters come with theirs."""

    name: str
    number: int
    total: int

    def __str__(self) -> str:
        return f"loading {self.name} ({self.number} of {self.total})"


class Engine(MixtureHost, Protocol):
    @property
    def failure(self) -> str | None:
        """Why the engine is dead; None while it lives."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often something of it has died and was started again."""
        ...

    @property
    def down(self) -> frozenset[str]:
        """Members that nothing answers for now."""
        ...

    def start(self) -> None:
        """Returns when requests can be answered; that may take minutes. Called from a thread of its own. Raises
        `ModelLoadError`."""

    def stop(self) -> None:
        """End all live generations with `EngineDeadError` and free everything, also if it is only being started.
        Returns when that is done. Called from a thread that is not the event loop's."""
