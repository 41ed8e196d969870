"""Which members share one vLLM model.

vLLM gives an engine one model, and there an ensemble is one model (`server.one_model`). Members that some probability
average mixes are placed together, so that each is loaded once: alone it answers as the mixture with all weight on it.
Members that stand on the same weights (a base and its adapters) are together for the same reason. All others get a
vLLM model of their own, since every member of a model is run for every request to it.

For the same reason a base that is not listed, and that no ensemble names, is not run: only its adapters are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.probability_averaging import AUTO, ProbabilityAverage, mixture_of
from ensemble_server.server.config.blocks import HostedModel, ModelEntry
from ensemble_server.server.config.values import Dtype
from ensemble_server.server.weights.adapters import adapter_of


@dataclass(frozen=True)
class Weights:
    """What makes two members the same to vLLM: they differ in their views of text at most."""

    checkpoint: Path
    dtype: Dtype  # as in the config
    adapter: Path | None = None


@dataclass(frozen=True)
class Placement:
    """One vLLM model. `slots`: member -> its place among `parts`; a base that is not run has none. `mixture`: the
    directory's own, over slots' names.

    A part is named after the first member that stands on it. The mixture matters where evidence is followed: what
    vLLM's cache keeps of it is made for the directory's pool, weights and share.
    """

    parts: Mapping[str, Weights]
    slots: Mapping[str, int]
    mixture: Mixture

    @property
    def keeps_evidence(self) -> bool:
        return self.mixture.pool == "posterior"

    def mixture_of_parts(self, mixture: Mixture) -> Mixture:
        """`mixture` over members as one over parts: views of the same weights add up."""
        names = list(self.parts)
        weights = dict.fromkeys(names, 0.0)
        for member, weight in mixture.weights.items():
            weights[names[self.slots[member]]] += weight
        return Mixture(weights, mixture.pool, mixture.share)


def placements(models: Mapping[str, ModelEntry], checkpoints: Mapping[str, Path]) -> list[Placement]:
    """`checkpoints`: the folder of each model with a `path`. Raises `ModelLoadError` for two ensembles that follow
    evidence in ways that one vLLM model cannot keep both.
    """
    hosted = {name: entry for name, entry in models.items() if isinstance(entry, HostedModel)}
    averages = {name: entry for name, entry in models.items() if isinstance(entry, ProbabilityAverage.Config)}
    weights = {name: _weights(entry, name, hosted, checkpoints) for name, entry in hosted.items()}
    groups = Groups(hosted)
    for name, first in weights.items():
        for other, second in weights.items():
            if (first.checkpoint, first.dtype) == (second.checkpoint, second.dtype):
                groups.join(name, other)
    for average in averages.values():
        members = [member for member in average.members if member in hosted]
        for member in members:
            groups.join(members[0], member)
    idle = _mere_bases(hosted, models)
    return [_placement(members, weights, averages, idle) for members in groups.listed()]


class Groups:
    """Names, each in one group; groups can be joined."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self._group = {name: [name] for name in names}

    def join(self, one: str, other: str) -> None:
        kept, gone = self._group[one], self._group[other]
        if kept is not gone:
            kept.extend(gone)
            for name in gone:
                self._group[name] = kept

    def listed(self) -> list[list[str]]:
        """The groups and the names in each, in the order in which the names were given."""
        found: dict[int, list[str]] = {}
        for name, group in self._group.items():
            found.setdefault(id(group), []).append(name)
        return list(found.values())


def _mere_bases(hosted: Mapping[str, HostedModel], models: Mapping[str, ModelEntry]) -> set[str]:
    """Models that only lend their weights to adapters."""
    named = {name for entry in models.values() if isinstance(entry, MethodConfig) for name in entry.references()}
    bases = {
        entry.base for name, entry in hosted.items() if adapter_of(name, entry) is not None and entry.base is not None
    }
    return {name for name in bases - named if not hosted[name].listed}


def _weights(
    entry: HostedModel, name: str, hosted: Mapping[str, HostedModel], checkpoints: Mapping[str, Path]
) -> Weights:
    root = entry.base or name
    adapter = adapter_of(name, entry)
    return Weights(checkpoints[root], hosted[root].dtype, adapter)


def _placement(
    members: list[str],
    weights: Mapping[str, Weights],
    averages: Mapping[str, ProbabilityAverage.Config],
    idle: Collection[str],
) -> Placement:
    parts: dict[Weights, str] = {}
    for member in members:
        if member not in idle:
            parts.setdefault(weights[member], member)
    order = list(parts)
    slots = {member: order.index(weights[member]) for member in members if weights[member] in parts}
    placement = Placement({name: part for part, name in parts.items()}, slots, Mixture(dict.fromkeys(slots, 1.0)))
    for name, average in averages.items():
        if average.share == AUTO:
            raise ModelLoadError(
                f"model {name!r}: share: auto is learnt by the transformers engine; vLLM keeps evidence for one share, "
                "so give it a number such as 0.01, or set engine.kind: transformers"
            )
    following = {
        name: mixture_of(average.members, average.pool, average.share)
        for name, average in averages.items()
        if average.pool == "posterior" and set(average.members) <= set(slots)
    }
    return Placement(placement.parts, slots, _own_mixture(placement, following))


def _own_mixture(placement: Placement, following: Mapping[str, Mixture]) -> Mixture:
    """The directory's own mixture: that of the ensembles with the posterior pool, if there are any."""
    uniform = Mixture(dict.fromkeys(placement.parts, 1.0))
    if not following:
        return uniform
    mixtures = {name: placement.mixture_of_parts(mixture) for name, mixture in following.items()}
    shared = {name: mixture for name, mixture in mixtures.items() if mixture.share}
    if not shared:
        return Mixture(uniform.weights, "posterior")
    (first, own), *others = shared.items()
    for other, mixture in others:
        if mixture != own:
            raise ModelLoadError(
                f"models {first!r} and {other!r} are on one vLLM model, which keeps evidence with a share above 0 for "
                "one set of weights and one share; give both the same, or set `share: 0`"
            )
    return own
