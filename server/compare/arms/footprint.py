"""The memory that arms take, and which of them are loaded and scored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.compare.arms.candidates import ArmModel
from ensemble_server.server.compare.arms.identity import weights_folder
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel
from ensemble_server.server.config.excerpt import closure
from ensemble_server.server.weights.delta_folder import bytes_in_memory, read_card
from ensemble_server.server.weights.footprint import read_shape, read_weights

USABLE_MEMORY = 0.8  # of what is free: activations and the rest of the process take some


@dataclass(frozen=True)
class Footprint:
    """Memory that models take. `weights`: loaded checkpoint or adapter -> bytes; `kv_bytes`: per token, all members.

    `is_whole`: no part of it runs elsewhere, where nobody knows what it takes.
    """

    weights: Mapping[str, int]
    kv_bytes_per_token: int
    is_whole: bool = True

    @property
    def weights_bytes(self) -> int:
        return sum(self.weights.values())


def footprint(config: Config, name: str) -> Footprint:
    """Of one model with all that it refers to, from file headers alone. Raises `ModelLoadError`."""
    weights: dict[str, int] = {}
    kv_bytes = 0
    in_use = leaves(config, name)
    for part in closure(config, [name]):
        entry = config.models[part]
        if not isinstance(entry, HostedModel):
            continue
        folder, root = weights_folder(config, part)
        stored = read_weights(folder)
        weights[f"{folder} {root.dtype}"] = stored.bytes_as(root.dtype)
        if entry.adapter is not None:
            weights[entry.adapter] = sum(file.stat().st_size for file in Path(entry.adapter).glob("*.safetensors"))
        if entry.delta is not None:
            weights[entry.delta] = bytes_in_memory(read_card(Path(entry.delta)))
        if part in in_use:
            bytes_per_number = max(1, round(stored.bytes_as(root.dtype) / stored.num_parameters))
            kv_bytes += read_shape(folder).kv_bytes(1, bytes_per_number)
    return Footprint(weights, kv_bytes, all(isinstance(config.models[leaf], HostedModel) for leaf in in_use))


def leaves(config: Config, name: str) -> set[str]:
    """The single models that run when `name` does: not the base of an adapter, which only holds its weights."""
    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return {leaf for part in entry.references() for leaf in leaves(config, part)}
    return {name}


def is_priced(config: Config, name: str) -> bool:
    """Whether what a model costs in money is known: every remote part of it has a price, were it 0."""
    entries = [config.models[leaf] for leaf in leaves(config, name)]
    return all(entry.has_price for entry in entries if isinstance(entry, RemoteModel))


def _root(config: Config, name: str) -> str:
    """The entry that has the weights of a hosted model; any other model stands for itself."""
    entry = config.models[name]
    return entry.base if isinstance(entry, HostedModel) and entry.base is not None else name


def groups(config: Config, arms: Sequence[ArmModel], *, free_bytes: float) -> list[list[ArmModel]]:
    """Arms that fit into memory together, in their order; one that alone does not fit is tried alone.

    `free_bytes`: what the machine has left. Weights that arms share are counted once.
    """
    budget = USABLE_MEMORY * free_bytes
    made: list[list[ArmModel]] = []
    loaded: dict[str, int] = {}
    for arm in arms:
        try:
            needs = footprint(config, arm.model)
        except ModelLoadError:  # opening it will say why
            needs = Footprint({}, 0)
        together = {**loaded, **needs.weights}
        kv_bytes = needs.kv_bytes_per_token * config.engine.max_context
        if made and sum(together.values()) + kv_bytes <= budget:
            made[-1].append(arm)
            loaded = together
        else:
            made.append([arm])
            loaded = dict(needs.weights)
    return made


def free_memory() -> float:
    """Bytes that the machine has left."""
    import psutil

    return float(psutil.virtual_memory().available)


def clusters(config: Config, arms: Sequence[ArmModel]) -> list[list[ArmModel]]:
    """Arms that share weights stand together, all in their order: they can be scored in one pass of these."""
    made: list[tuple[set[str], list[ArmModel]]] = []
    for arm in arms:
        roots = {_root(config, name) for name in leaves(config, arm.model)}
        touching = [cluster for cluster in made if cluster[0] & roots]
        made = [cluster for cluster in made if not cluster[0] & roots]
        joined = [other for _, others in touching for other in others]
        made.append((roots.union(*(names for names, _ in touching)), [*joined, arm]))
    places = {id(arm): place for place, arm in enumerate(arms)}
    ordered = [sorted(cluster, key=lambda arm: places[id(arm)]) for _, cluster in made]
    return sorted(ordered, key=lambda cluster: places[id(cluster[0])])
