"""How many rows are in flight: enough to keep the models busy, and no more than their queues hold."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from ensemble_server.ensembles.base import DistributionModel, Model
from ensemble_server.ensembles.method import Method
from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.config.blocks import RemoteModel

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

_BATCHES = 2  # of the engine: one that runs, and one whose prompts are being prepared meanwhile


@runtime_checkable
class MayBeOutOfReach(Protocol):
    """A model behind an endpoint. `is_out_of_reach`: the last try found nobody there who takes requests."""

    name: str
    is_out_of_reach: bool


class Room:
    """Places for rows. `size`: how many there are; a row that needs more than that waits until it is alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._num_free = size
        self._changed = asyncio.Event()

    async def take(self, num_places: int) -> None:
        """Wait for so many free places and take them. For one task alone: rows begin in their order."""
        while self._num_free < min(num_places, self._size):
            self._changed.clear()
            await self._changed.wait()
        self._num_free -= num_places

    def give_back(self, num_places: int) -> None:
        self._num_free += num_places
        self._changed.set()


def num_sequences(hosting: Hosting) -> int:
    """How many sequences a run keeps in flight by default: two of the engine's batches, and all that remotes take."""
    config = hosting.config
    local = min(_BATCHES * config.engine.max_batch, config.engine.max_batch + config.server.max_queue)
    remotes = [entry for entry in config.models.values() if isinstance(entry, RemoteModel)]
    return local + sum(remote.max_concurrency for remote in remotes)


def sequences_of(row: Row, hosting: Hosting) -> int:
    """How many sequences a row may keep busy at the same time: its choices, times what its model fans out to."""
    n = row.body.get("n")
    num_choices = n if isinstance(n, int) and n > 0 else 1
    model = _model_of(row, hosting)
    return num_choices * (1 if model is None else model.fan_out)


def is_text_level(row: Row, hosting: Hosting) -> bool:
    """Whether the row's model is an ensemble of texts, whose answer does not tell what a time limit cost it."""
    model = _model_of(row, hosting)
    return model is not None and _asks_others(model)


def lacks_members(row: Row, hosting: Hosting) -> bool:
    """Whether the row's model is an ensemble of texts that would go on now without members whose engine is down."""
    model = _model_of(row, hosting)
    return model is not None and _asks_others(model) and bool(model.singles & hosting.down)


def model_name(row: Row, hosting: Hosting) -> str:
    """Whom the row asks; a name that the hosting may not have."""
    return str(row.body.get("model") or hosting.listed[0])


def is_out_of_reach(row: Row, hosting: Hosting) -> bool:
    """Whether a model that the row asks, by itself or through an ensemble, is behind an endpoint that is down."""
    model = _model_of(row, hosting)
    names = model.singles if isinstance(model, Method) else () if model is None else (model.name,)
    parts = (hosting.models.get(name) for name in names)
    return any(isinstance(part, MayBeOutOfReach) and part.is_out_of_reach for part in parts)


def _model_of(row: Row, hosting: Hosting) -> Model | None:
    name = row.body.get("model") or hosting.listed[0]
    return hosting.models.get(name) if isinstance(name, str) else None


def _asks_others(model: Model) -> TypeGuard[Method]:
    return isinstance(model, Method) and not isinstance(model, DistributionModel)
