"""What a config holds, model by model: kind, parts, settings, and what weights and caches take in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ensemble_server.ensembles.base import AveragedOver, Gate
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.config.blocks import Config, EngineConfig, HostedModel, ModelEntry, RemoteModel
from ensemble_server.server.config.credentials import without_credentials
from ensemble_server.server.rehearsal import Rehearsal
from ensemble_server.server.weights.delta_folder import bytes_in_memory, read_card
from ensemble_server.server.weights.footprint import DTYPE_BYTES, Weights, read_shape, read_weights

_SHOWN_ELSEWHERE = frozenset({"method", "members", "listed", "url", "path", "base", "adapter", "delta"})


@dataclass(frozen=True)
class Size:
    """Of one hosted member. `num_bytes`: of weights that are its own; `kv_bytes`: of the cache of one full sequence.

    `storage` is equal for members whose own weights are one copy in memory.
    """

    storage: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    kv_bytes: int
    context: int


@dataclass(frozen=True)
class Item:
    """`made_of`: a path, an address, members. `settings`: the other keys that the config sets."""

    name: str
    kind: str  # hosted, adapter, delta, view, remote, or the ensemble's method
    is_listed: bool
    made_of: str
    settings: dict[str, Any]
    size: Size | None = None
    vocabulary: int | None = None  # tokens, of a hosted member
    averaged_over: AveragedOver | None = None  # of a probability average


@dataclass(frozen=True)
class Inventory:
    source: Path
    max_batch: int
    items: list[Item]
    kv_cache_bytes: int | None  # the bound of the config, if it has one
    problems: tuple[str, ...] = field(default=())

    @property
    def weights_bytes(self) -> int:
        """Of all weights, each copy counted once."""
        return sum({item.size.storage: item.size.num_bytes for item in self.items if item.size}.values())

    @property
    def kv_bytes(self) -> int:
        """Of the caches of as many full sequences as may run, on every member at once: the most that it can be, if the
        config sets no bound below."""
        wanted = self.max_batch * sum(item.size.kv_bytes for item in self.items if item.size)
        return wanted if self.kv_cache_bytes is None else min(wanted, self.kv_cache_bytes)


def take_inventory(config: Config, rehearsal: Rehearsal) -> Inventory:
    """Reads headers of weight files. A size that cannot be read (of *.bin files, say) stays empty."""
    items = [_item(name, model, config, rehearsal) for name, model in config.models.items()]
    bound = config.engine.kv_cache_mb if isinstance(config.engine, EngineConfig) else None
    return Inventory(
        config.source,
        config.engine.max_batch,
        items,
        None if bound is None else bound * 2**20,
        rehearsal.problems,
    )


def _item(name: str, model: ModelEntry, config: Config, rehearsal: Rehearsal) -> Item:
    kind, made_of = _described(model)
    settings = {
        key: getattr(model, key)
        for key in type(model).model_fields
        if key in model.model_fields_set and key not in _SHOWN_ELSEWHERE
    }
    settings = {key: _setting(value) for key, value in settings.items()}
    view = rehearsal.files.views.get(name)
    size = None
    if view is not None and isinstance(model, HostedModel):
        try:
            size = _size(name, model, config, rehearsal)
        except ModelLoadError:
            size = None
    over = rehearsal.averaged_over.get(name)
    return Item(name, kind, model.listed, made_of, settings, size, view and view.vocab_size, over)


def _setting(value: Any) -> Any:
    """Of a gate, that there is one: what it has learnt are numbers that nobody reads here."""
    if isinstance(value, Gate):
        return True
    return value.model_dump() if isinstance(value, BaseModel) else value


def _size(name: str, model: HostedModel, config: Config, rehearsal: Rehearsal) -> Size:
    root_name = model.base or name
    root = config.models[root_name]
    assert isinstance(root, HostedModel), "the config was checked"
    folder = rehearsal.files.checkpoints[root_name]
    base, shape = read_weights(folder), read_shape(folder)
    storage: tuple[str, ...] = (str(folder), root.dtype, root.device)
    own = base
    if model.base is not None:
        own = read_weights(Path(model.adapter)) if model.adapter is not None else Weights(0, 0)
        if model.delta is not None:
            card = read_card(Path(model.delta))
            own = Weights(card.facts["num_weights"], bytes_in_memory(card))
        storage += (model.adapter or model.delta or "",)
    context = rehearsal.files.views[name].max_model_len
    # Weights may be quantised; caches have 16 bits at least.
    bytes_per_number = DTYPE_BYTES.get(root.dtype) or max(2, round(base.num_bytes / base.num_parameters))
    kv_bytes = shape.kv_bytes(context, bytes_per_number)
    num_bytes = own.num_bytes if model.delta is not None else own.bytes_as(root.dtype)
    return Size(storage, own.num_parameters, num_bytes, kv_bytes, context)


def _described(model: ModelEntry) -> tuple[str, str]:
    """Kind, and what it is made of."""
    if isinstance(model, RemoteModel):
        return "remote", without_credentials(model.url)
    if isinstance(model, MethodConfig):
        return model.method, _members(model)
    if model.path is not None:
        return "hosted", model.path
    if model.delta is not None:
        return "delta", f"{model.base} + {Path(model.delta).name}"
    if model.adapter is None:
        return "view", str(model.base)
    return "adapter", f"{model.base} + {Path(model.adapter).name}"


def _members(config: MethodConfig) -> str:
    """{"base": 1.0, "code": 2.0} -> "base, code x2" """
    named = (name if weight == 1 else f"{name} x{weight:g}" for name, weight in config.members.items())
    return ", ".join(named)
