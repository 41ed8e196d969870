"""What is decided on held-out text before anything is measured: fitted weights, and the best of an arm's variants.

The order: weights are fitted for every variant that asks for it, then the variants of one arm are scored on the same
held-out texts, and the one with the fewest bits per byte (mean over the texts) becomes the arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ensemble_server.ensembles.errors import EnsembleError, ModelLoadError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.compare.arms.candidates import Candidate, Entry, as_arm_model
from ensemble_server.server.compare.arms.footprint import free_memory, groups
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.deciding.fitting import FittedWeights, WeightFit, check_fittable
from ensemble_server.server.compare.kept.provenance import COMPUTING, versions
from ensemble_server.server.compare.kept.records import ArmRecord, Failure, Preparation, Records, inputs_hash
from ensemble_server.server.compare.kept.results import Choice
from ensemble_server.server.compare.listener import Listener
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.text_measure import NotScored, measure_text
from ensemble_server.server.compare.planning.plan import Plan
from ensemble_server.server.compare.planning.sources import sha256_of
from ensemble_server.server.compare.running.work import described
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.excerpt import excerpt
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.weights.threads import in_own_thread


@dataclass(frozen=True)
class Prepared:
    """The variant that is the arm, ready to be hosted under the arm's name, and how that was decided."""

    candidate: Candidate
    preparation: Preparation


async def prepare(
    plan: Plan,
    replicate: str | None,
    candidates: Mapping[str, Sequence[Candidate]],
    held_out: Mapping[str, Documents],
    records: Records,
    listener: Listener,
) -> dict[str, Prepared | Failure]:
    """Arm -> what it is. Decisions of an earlier run stand if nothing that they depend on has changed."""
    decided: dict[str, Prepared | Failure] = {}
    pending: dict[str, list[Candidate]] = {}
    for arm, variants in candidates.items():
        built = [candidate for candidate in variants if candidate.failure is None]
        if not built:
            decided[arm] = variants[0].failure or Failure(stage="build", message="it has no variant")
            continue
        try:
            inputs = _inputs(plan, replicate, variants, held_out)
        except EnsembleError as exc:
            decided[arm] = Failure(stage="load", message=str(exc))
            continue
        known = records.get(arm, replicate).preparation
        if known is not None and known.inputs == inputs:
            decided[arm] = Prepared(_as_decided(variants[known.variant], known), known)
        elif len(variants) == 1 and not variants[0].is_fitted:
            decided[arm] = Prepared(variants[0], Preparation(inputs=inputs))
        else:
            pending[arm] = built
    fits = await _fits(
        plan, replicate, [one for ones in pending.values() for one in ones if one.is_fitted], held_out, listener
    )
    for arm, variants in pending.items():
        try:
            prepared = await _decide(plan, replicate, variants, fits, held_out, listener)
        except Exception as exc:  # whatever loading and reading may raise ends this arm alone
            decided[arm] = Failure(stage="fit", message=described(exc))
            continue
        inputs = _inputs(plan, replicate, candidates[arm], held_out)
        prepared = replace(prepared, preparation=prepared.preparation.model_copy(update={"inputs": inputs}))
        decided[arm] = prepared
        _save(records, arm, replicate, prepared)
    return {arm: decided[arm] for arm in candidates}


def _save(records: Records, arm: str, replicate: str | None, prepared: Prepared) -> None:
    record: ArmRecord = records.get(arm, replicate)
    record.preparation = prepared.preparation
    records.save(record)


def _as_decided(candidate: Candidate, preparation: Preparation) -> Candidate:
    return candidate.fitted(preparation.weights, preparation.share) if candidate.is_fitted else candidate


def _inputs(plan: Plan, replicate: str | None, variants: Sequence[Candidate], held_out: Mapping[str, Documents]) -> str:
    entries = {candidate.model: candidate.entry for candidate in variants if candidate.entry is not None}
    config = config_with(plan, replicate, entries)
    parts: dict[str, Any] = {
        "models": [
            None if candidate.failure is not None else [identity(config, candidate.model), candidate.is_fitted]
            for candidate in variants
        ]
    }
    if len(variants) > 1 or variants[0].is_fitted:
        parts |= {
            "held_out": {name: sha256_of(documents) for name, documents in held_out.items()},
            "window": [plan.file.window, plan.file.stride],
            "versions": versions(COMPUTING),
        }
    return inputs_hash(parts)


def config_with(plan: Plan, replicate: str | None, entries: Mapping[str, Entry]) -> Config:
    """The config in which these models stand, too, with the replicate's members in place of the usual ones."""
    replaced = plan.file.replicates[replicate] if replicate is not None else {}
    return plan.extended({**replaced, **entries})


async def _decide(
    plan: Plan,
    replicate: str | None,
    variants: Sequence[Candidate],
    fits: Mapping[str, FittedWeights | Exception],
    held_out: Mapping[str, Documents],
    listener: Listener,
) -> Prepared:
    """The best of the variants, with what was fitted. `inputs` is left empty. Raises what a fit raised."""
    ready = []
    for one in variants:
        if isinstance(fit := fits.get(one.model), Exception):
            raise fit
        ready.append(one if fit is None else one.fitted(*_found(fit)))
    best, choice = ready[0], None
    if len(ready) > 1:
        listener.stage(f"{best.arm.name}: choosing among {len(ready)} variants on held-out text")
        scores = await _scores(plan, replicate, ready, held_out, listener)
        best = min((one for one in ready if one.index in scores), key=lambda one: scores[one.index])
        candidates = {one.label: scores[one.index] for one in ready if one.index in scores}
        choice = Choice(name=best.label, candidates=candidates, measure="bpb")
    fit = fits.get(best.model)
    assert not isinstance(fit, Exception), "it would have been raised above"
    weights, share = (None, None) if fit is None else _found(fit)
    return Prepared(best, Preparation(inputs="", variant=best.index, weights=weights, share=share, chosen=choice))


def _found(fit: FittedWeights) -> tuple[dict[str, float] | None, float | None]:
    """Weights or, of a posterior pool, the share."""
    return (dict(fit.weights), None) if fit.share is None else (None, fit.share)


async def _fits(
    plan: Plan,
    replicate: str | None,
    variants: Sequence[Candidate],
    held_out: Mapping[str, Documents],
    listener: Listener,
) -> dict[str, FittedWeights | Exception]:
    """Model -> what was fitted, or why it could not be. Pools over the same members read the held-out text once."""
    same_members: dict[tuple[str, ...], list[Candidate]] = {}
    for one in variants:
        same_members.setdefault(tuple((one.entry or {}).get("members", ())), []).append(one)
    waiting = list(same_members.values())
    found: dict[str, FittedWeights | Exception] = {}
    while waiting:
        together = waiting.pop(0)
        listener.stage(f"fitting {', '.join(one.arm.name for one in together)} on held-out text")
        try:
            found |= await _fit_together(plan, replicate, together, held_out, listener)
        except Exception as exc:
            if len(together) > 1:  # alone, to know whose fault it was
                waiting += [[one] for one in together]
            else:
                found[together[0].model] = exc
    return found


async def _fit_together(
    plan: Plan,
    replicate: str | None,
    variants: Sequence[Candidate],
    held_out: Mapping[str, Documents],
    listener: Listener,
) -> dict[str, FittedWeights]:
    config = config_with(plan, replicate, {one.model: one.entry for one in variants if one.entry is not None})
    for one in variants:
        check_fittable(config, one.model)

    def is_not_geometric(name: str) -> bool:
        entry = config.models[name]
        assert isinstance(entry, ProbabilityAverage.Config), "nothing else can be fitted"
        return entry.pool != "geometric"

    names = sorted((one.model for one in variants), key=is_not_geometric)
    async with Hosting.open(excerpt(config, names)) as hosting:
        reading = await WeightFit.read(
            hosting,
            names[0],  # a geometric pool, if there is one: it needs more than the others
            list(held_out.values()),
            window=plan.file.window,
            stride=plan.file.stride,
            seed=plan.file.statistics.seed,
            on_progress=listener.progress,
        )
        return {name: await in_own_thread(replace(reading, model=hosting.models[name]).solve) for name in names}


async def _scores(
    plan: Plan,
    replicate: str | None,
    variants: Sequence[Candidate],
    held_out: Mapping[str, Documents],
    listener: Listener,
) -> dict[int, float]:
    """Variant -> bits per byte on the held-out texts, each counted alike. Raises `ModelLoadError` if none has any.

    As many are loaded together as the memory holds.
    """
    entries = {candidate.model: candidate.entry for candidate in variants if candidate.entry is not None}
    config = config_with(plan, replicate, entries)
    models = [replace(as_arm_model(candidate, config, replicate), arm=candidate.model) for candidate in variants]
    per_text: dict[str, list[float]] = {candidate.model: [] for candidate in variants}
    reasons: list[str] = []
    for group in groups(config, models, free_bytes=free_memory()):
        names = {one.arm: one.model for one in group}
        async with Hosting.open(excerpt(config, list(names.values()))) as hosting:
            for text, documents in held_out.items():
                scores = await measure_text(
                    hosting,
                    names,
                    documents,
                    window=plan.file.window,
                    stride=plan.file.stride,
                    on_progress=listener.progress,
                )
                for model, found in scores.items():
                    if isinstance(found, NotScored):
                        reasons.append(f"{text}: {found.reason}")
                    else:
                        per_text[model].append(found.bits_per_byte)
    complete = {
        candidate.index: float(np.mean(per_text[candidate.model]))
        for candidate in variants
        if len(per_text[candidate.model]) == len(held_out)
    }
    if not complete:
        raise ModelLoadError(f"no variant could be scored on the held-out text ({reasons[0]})")
    return complete
