"""What the weights of a job take in memory, before anything is loaded: member by member, or all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.batch.placement.phases import Phase, phases
from ensemble_server.server.config.blocks import Config, HostedModel


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of weights, from the checkpoints' headers: of each phase, and of all that would be resident otherwise.

    `available`: what the machine has free. Caches come on top; `engine.max_batch` and `max_context` bound them.
    """

    phases: Mapping[Phase, int]
    resident: int
    available: int

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)

    def sentences(self) -> Iterator[str]:
        for phase, num_bytes in self.phases.items():
            yield f"{', '.join(phase.models)}: {_megabytes(num_bytes)} of weights"
        yield (
            f"at most {_megabytes(self.peak)} of weights at a time instead of {_megabytes(self.resident)}; "
            f"{_megabytes(self.available)} are free"
        )
        if self.peak > self.available:
            yield "warning: the largest of these does not fit into what is free"


def estimated_memory(config: Config, names: Iterable[str]) -> MemoryEstimate:
    """Reads headers, loads nothing. Raises `ModelLoadError` for a checkpoint that is not there."""
    import psutil

    sizes = {phase: {root: _stored_bytes(config, root) for root in phase.weights} for phase in phases(config, names)}
    adapters = {phase: sum(_adapter_bytes(config, model) for model in phase.models) for phase in sizes}
    roots = {root: size for parts in sizes.values() for root, size in parts.items()}
    return MemoryEstimate(
        {phase: sum(parts.values()) + adapters[phase] for phase, parts in sizes.items()},
        sum(roots.values()) + sum(adapters.values()),
        psutil.virtual_memory().available,
    )


def _stored_bytes(config: Config, root: str) -> int:
    from ensemble_server.server.weights.checkpoints import resolve_checkpoint
    from ensemble_server.server.weights.footprint import read_weights

    entry = config.models[root]
    assert isinstance(entry, HostedModel), f"{root!r} has weights"
    assert entry.path is not None, f"{root!r} has weights of its own"
    folder = resolve_checkpoint(
        entry.path, relative_to=config.source.parent, revision=entry.revision, may_download=False
    )
    return read_weights(folder).bytes_as(entry.dtype)


def _adapter_bytes(config: Config, name: str) -> int:
    from ensemble_server.server.weights.footprint import read_weights

    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return sum(_adapter_bytes(config, member) for member in entry.references())
    adapter = entry.adapter if isinstance(entry, HostedModel) else None
    return 0 if adapter is None else read_weights(Path(adapter)).num_bytes


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
