"""Arms as ordinary models: one config that holds the plan's models and everything that is made for the comparison.

A merge is built (or taken from the cache) and becomes a hosted entry of its own; an inline entry becomes an entry; a
model of the config is one already. Then `Hosting` opens them like any others. What cannot be built is a `Failure` of
that arm alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, EnsembleError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.compare.kept.records import Failure
from ensemble_server.server.compare.kept.results import ArmKind
from ensemble_server.server.compare.merges.merging import build_merge
from ensemble_server.server.compare.planning.blocks import Arm, Variant
from ensemble_server.server.compare.planning.plan import Plan, is_fitted, without_fit
from ensemble_server.server.config.blocks import Config, HostedModel, ModelEntry, RemoteModel
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.weights.threads import in_own_thread

Entry = Mapping[str, Any]  # a model entry as YAML
Distiller = Callable[[Config, Distillation, Callable[[str], None]], Entry]


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
    plan: Plan,
    config: Config,
    arm: Arm,
    *,
    distiller: Distiller | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> list[Candidate]:
    """Every variant of an arm; a model of the config is its own single one. Builds merges and teaches students, which
    may take minutes.

    `config`: the models that recipes may name. `distiller` teaches, and gives the student's entry; called in a thread.
    """
    if arm.is_of_config:
        return [Candidate(arm, 0, arm.name, arm.name, None)]
    if arm.distill is not None:
        return [await _taught(config, arm, arm.distill, distiller, say)]
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


async def _taught(
    config: Config, arm: Arm, wanted: Distillation, distiller: Distiller | None, say: Callable[[str], None]
) -> Candidate:
    try:
        if distiller is None:
            raise ConfigError("nothing here can teach it: compare with `ensemble compare`, or give a `distiller`")
        entry = await in_own_thread(distiller, config, wanted, lambda stage: say(f"{arm.name}: {stage}"))
    except EnsembleError as exc:
        return Candidate(arm, 0, arm.name, arm.name, None, Failure(stage="build", message=str(exc)))
    return Candidate(arm, 0, arm.name, arm.name, entry)


async def _merged(plan: Plan, config: Config, recipe: str | Mapping[str, Any], say: Callable[[str], None]) -> Path:
    return await in_own_thread(
        build_merge,
        Path(recipe) if isinstance(recipe, str) else recipe,
        config,
        folder=plan.path.absolute().parent,
        seed=plan.file.statistics.seed,
        on_stage=say,
    )


def _dtype(plan: Plan, config: Config) -> str:
    """Merges run in the number format of what they are compared with: that of the first arm with weights of its own,
    else of the config's first model that has some. Which arm is the baseline does not count: it only decides what is
    subtracted.
    """
    names = [arm.name for arm in plan.file.arms if arm.is_of_config]
    for entry in [config.models[name] for name in (*names, *config.models)]:
        if isinstance(entry, HostedModel):
            root = entry if entry.base is None else config.models[entry.base]
            assert isinstance(root, HostedModel), "checked when the config was read"
            return root.dtype
    return "auto"


def as_arm_model(candidate: Candidate, config: Config, replicate: str | None) -> ArmModel:
    """The candidate as it stands in `config`, under its arm's name."""
    entry = config.models[candidate.model]
    return ArmModel(
        candidate.arm.name,
        replicate,
        candidate.model,
        made_kind_of(candidate) or kind_of(entry),
        tuple(entry.members) if isinstance(entry, MethodConfig) else (candidate.model,),
        candidate.arm.description or _described(candidate, entry),
    )


def made_kind_of(candidate: Candidate) -> ArmKind | None:
    """Of what is made for the comparison and whose entry does not show it. A control is an ordinary model."""
    if candidate.arm.distill is not None:
        return "distilled" if candidate.arm.distill.clm < 1 else "member"
    return "merge" if candidate.variant is not None and candidate.variant.merge is not None else None


def kind_of(entry: ModelEntry) -> ArmKind:
    if isinstance(entry, MethodConfig):
        return "ensemble"
    return "remote" if isinstance(entry, RemoteModel) else "member"


def _described(candidate: Candidate, entry: ModelEntry) -> str:
    if isinstance(entry, MethodConfig):
        pool = getattr(entry, "pool", None)
        share = getattr(entry, "share", 0)
        settings = [*([pool] if pool else []), *([f"share {share}"] if share or pool == "posterior" else [])]
        settings += ["gate"] if getattr(entry, "gate", None) is not None else []
        settings += ["fitted"] if candidate.is_fitted else []
        return f"{entry.method} of {', '.join(entry.members)}" + (f" ({', '.join(settings)})" if settings else "")
    if (wanted := candidate.arm.distill) is not None:
        return f"{wanted.student} taught by {wanted.ensemble} ({wanted.target}, from {wanted.init})"
    if candidate.variant is not None and isinstance(recipe := candidate.variant.merge, dict):
        return f"merge: {recipe.get('merge_method', 'moe')}"
    if candidate.variant is not None and candidate.variant.merge is not None:
        return f"merge: {Path(str(candidate.variant.merge)).name}"
    if isinstance(entry, HostedModel) and entry.adapter is not None:
        return f"LoRA adapter of {entry.base}"
    if isinstance(entry, HostedModel) and entry.delta is not None:
        return f"delta on {entry.base}"
    return ""
