"""Arms as ordinary models: one config that holds the plan's models and everything that is made for the comparison.

A merge is built (or taken from the cache) and becomes a hosted entry of its own; an inline entry becomes an entry; a
model of the config is one already. Then `Hosting` opens them like any others. What cannot be built is a `Failure` of
that arm alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensembles.errors import EnsembleError, ModelLoadError
from ensembles.method import MethodConfig
from server.checkpoints import resolve_checkpoint
from server.compare.blocks import Arm, Variant
from server.compare.content_cache import digest, folder_digest
from server.compare.merging import build_merge
from server.compare.plan import Plan, is_fitted, without_fit
from server.compare.records import Failure
from server.compare.results import ArmKind
from server.config import Config, HostedModel, ModelEntry, RemoteModel
from server.footprint import read_shape, read_weights

Entry = Mapping[str, Any]  # a model entry as YAML
USABLE_MEMORY = 0.8  # of what is free: activations and the rest of the process take some


@dataclass(frozen=True)
class ArmModel:
    """An arm, or one variant of it, as a model. `model`: its name in the config."""

    arm: str
    replicate: str | None
    model: str
    kind: ArmKind
    members: tuple[str, ...]
    description: str = ""


@dataclass(frozen=True)
class Candidate:
    """One variant of an arm, built as far as it can be without loading a model. `label`: what reports call it."""

    arm: Arm
    index: int
    label: str
    model: str
    entry: Entry | None
    failure: Failure | None = None

    @property
    def is_fitted(self) -> bool:
        variant = self.variant
        return variant is not None and variant.ensemble is not None and is_fitted(variant.ensemble)

    @property
    def variant(self) -> Variant | None:
        return self.arm.variants[self.index] if self.arm.variants else None

    def fitted(self, weights: Mapping[str, float] | None, share: float | None) -> Candidate:
        """With what was fitted in its place."""
        assert self.entry is not None, "only what could be built is fitted"
        found = {} if weights is None else {"members": dict(weights)}
        found |= {} if share is None else {"share": share}
        return replace(self, entry={**self.entry, **found})


async def build_candidates(
    plan: Plan, config: Config, arm: Arm, *, say: Callable[[str], None] = lambda stage: None
) -> list[Candidate]:
    """Every variant of an arm; a model of the config is its own single one. Builds merges, which may take minutes.

    `config`: the models that recipes may name.
    """
    if arm.is_of_config:
        return [Candidate(arm, 0, arm.name, arm.name, None)]
    candidates = []
    for index, variant in enumerate(arm.variants):
        label = variant.label or (f"variant {index}" if arm.choose else arm.name)
        model = f"{arm.name}#{index}" if arm.choose else arm.name
        entry: Entry | None = None
        failure = None
        if variant.merge is None:
            entry = without_fit(variant.ensemble or {})
        else:
            try:
                folder = await _merged(plan, config, variant.merge, lambda stage: say(f"{arm.name}: {stage}"))
                entry = {"path": str(folder), "dtype": _dtype(plan, config)}
            except EnsembleError as exc:
                failure = Failure(stage="build", message=str(exc))
        candidates.append(Candidate(arm, index, label, model, entry, failure))
    return candidates


async def _merged(plan: Plan, config: Config, recipe: str | Mapping[str, Any], say: Callable[[str], None]) -> Path:
    return await asyncio.to_thread(
        build_merge,
        Path(recipe) if isinstance(recipe, str) else recipe,
        config,
        folder=plan.path.absolute().parent,
        seed=plan.file.statistics.seed,
        on_stage=say,
    )


def _dtype(plan: Plan, config: Config) -> str:
    """Merges run in the number format of the baseline's weights, so that no arm has finer arithmetic than another."""
    entry = config.models.get(plan.file.baseline)
    if isinstance(entry, HostedModel) and entry.base is not None:
        entry = config.models[entry.base]
    return entry.dtype if isinstance(entry, HostedModel) else "auto"


def as_arm_model(candidate: Candidate, config: Config, replicate: str | None) -> ArmModel:
    """The candidate as it stands in `config`, under its arm's name."""
    entry = config.models[candidate.model]
    is_merge = candidate.variant is not None and candidate.variant.merge is not None
    return ArmModel(
        candidate.arm.name,
        replicate,
        candidate.model,
        "merge" if is_merge else kind_of(entry),
        tuple(entry.members) if isinstance(entry, MethodConfig) else (candidate.model,),
        candidate.arm.description or _described(candidate, entry),
    )


def kind_of(entry: ModelEntry) -> ArmKind:
    if isinstance(entry, MethodConfig):
        return "ensemble"
    return "remote" if isinstance(entry, RemoteModel) else "member"


def _described(candidate: Candidate, entry: ModelEntry) -> str:
    if isinstance(entry, MethodConfig):
        pool = getattr(entry, "pool", None)
        share = getattr(entry, "share", 0)
        settings = [*([pool] if pool else []), *([f"share {share:g}"] if share or pool == "posterior" else [])]
        settings += ["fitted"] if candidate.is_fitted else []
        return f"{entry.method} of {', '.join(entry.members)}" + (f" ({', '.join(settings)})" if settings else "")
    if candidate.variant is not None and isinstance(recipe := candidate.variant.merge, dict):
        return f"merge: {recipe.get('merge_method', 'moe')}"
    if candidate.variant is not None and candidate.variant.merge is not None:
        return f"merge: {Path(str(candidate.variant.merge)).name}"
    if isinstance(entry, HostedModel) and entry.adapter is not None:
        return f"LoRA adapter of {entry.base}"
    return ""


# --- what a model stands on --------------------------------------------------------------------------------------


def closure(config: Config, names: Iterable[str]) -> list[str]:
    """These models and all that they refer to, in the config's order."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        entry = config.models[name]
        if isinstance(entry, MethodConfig):
            waiting += entry.references()
        elif isinstance(entry, HostedModel) and entry.base is not None:
            waiting.append(entry.base)
    return [name for name in config.models if name in found]


def only(config: Config, names: Iterable[str]) -> Config:
    """The config with these models and what they refer to, so that nothing else is loaded."""
    return config.model_copy(update={"models": {name: config.models[name] for name in closure(config, names)}})


def weights_folder(config: Config, name: str) -> tuple[Path, HostedModel]:
    """Where the weights of a hosted model lie, and the entry that has them. Raises `ModelLoadError`."""
    entry = config.models[name]
    assert isinstance(entry, HostedModel), "only hosted models have weights"
    root_name = name if entry.base is None else entry.base
    root = config.models[root_name]
    assert isinstance(root, HostedModel), "checked when the config was read"
    try:
        return resolve_checkpoint(root.path or "", relative_to=config.source.absolute().parent), root
    except ModelLoadError as exc:
        raise ModelLoadError(f"model {root_name!r}: {exc}") from exc


def identity(config: Config, name: str) -> str:
    """Hash of what decides the model's answers: weights, adapters, prompts, settings, those of its parts included.

    Names of files do not count, their content does. Raises `ModelLoadError` if a file is not there.
    """
    entry = config.models[name]
    settings = entry.model_dump(mode="json", exclude={"listed", "path", "base", "adapter"})
    parts: dict[str, Any] = {}
    if isinstance(entry, MethodConfig):
        parts = {part: identity(config, part) for part in sorted(entry.references())}
    elif isinstance(entry, HostedModel):
        folder, root = weights_folder(config, name)
        parts = {"weights": folder_digest(folder)}
        if root is not entry:
            parts["root"] = root.model_dump(mode="json", exclude={"listed", "path"})
        if entry.adapter is not None:
            parts["adapter"] = _adapter_digest(name, Path(entry.adapter))
    return digest({"settings": settings, "parts": parts})


def _adapter_digest(name: str, folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        raise ModelLoadError(
            f"model {name!r}: {folder} holds no adapter_config.json; give the folder of a LoRA adapter"
        )
    return folder_digest(folder)


@dataclass(frozen=True)
class Footprint:
    """Memory that models take. `weights`: loaded checkpoint or adapter -> bytes; `kv_bytes`: per token, all members."""

    weights: Mapping[str, int]
    kv_bytes_per_token: int

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
        if part in in_use:
            bytes_per_number = max(1, round(stored.bytes_as(root.dtype) / stored.num_parameters))
            kv_bytes += read_shape(folder).kv_bytes(1, bytes_per_number)
    return Footprint(weights, kv_bytes)


def leaves(config: Config, name: str) -> set[str]:
    """The single models that run when `name` does: not the base of an adapter, which only holds its weights."""
    entry = config.models[name]
    if isinstance(entry, MethodConfig):
        return {leaf for part in entry.references() for leaf in leaves(config, part)}
    return {name}


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
