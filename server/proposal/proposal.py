"""A config for what a user has: entries, the ensembles that suit them, and an engine that fits this machine.

Every ensemble that is proposed has been rehearsed (`server.rehearsal`): it will load. One that was tried and refused is
written down with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.proposal.machine import Machine
from ensemble_server.server.proposal.memory import Fit, Load, fit
from ensemble_server.server.proposal.sources import Entries
from ensemble_server.server.rehearsal import Rehearsal, rehearse
from ensemble_server.server.weights.checkpoint_facts import read_config
from ensemble_server.server.weights.footprint import as_bytes, as_count, read_shape, read_weights
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.vocabularies import family_of


@dataclass(frozen=True)
class Entry:
    """One entry of `models:`. `comment`: what is above it in the file."""

    name: str
    keys: dict[str, Any]
    comment: str


@dataclass(frozen=True)
class Proposal:
    """`notes`: what was found out, a line each. `refused`: ensembles that do not work, with the reason."""

    members: list[Entry]
    ensembles: list[Entry] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    engine_comment: str = ""
    notes: list[str] = field(default_factory=list)

    def as_config(self, source: Path) -> Config:
        """Raises `ConfigError` if it cannot be served after all."""
        models = {entry.name: entry.keys for entry in (*self.members, *self.ensembles)}
        return parse_config({"models": models, "engine": self.engine}, source=source)


def propose(entries: Entries, *, source: Path, machine: Machine) -> Proposal:
    """`source`: the config file that is to be; relative paths start at its folder. Blocks: hub models are downloaded.

    Raises `ModelLoadError` naming every model that cannot be loaded.
    """
    config = parse_config({"models": entries.all}, source=source)
    rehearsal = rehearse(config)
    rehearsal.check(config)
    files, views = rehearsal.files, rehearsal.files.views
    loads = []
    for name, checkpoint in files.checkpoints.items():
        num_members = 1 + sum(adapter["base"] == name for adapter in entries.adapters.values())
        try:
            loads.append(Load(read_weights(checkpoint), read_shape(checkpoint), num_members))
        except ModelLoadError:  # weights in *.bin, or a config of unusual words: their size is not known
            continue
    fitted = fit(loads, machine.free_bytes, prefers_float32=machine.prefers_float32)
    members = _members(entries, rehearsal, fitted)
    notes = _family_notes(views) + _likeness_notes(files.checkpoints)
    ensembles = []
    for entry in _suitable(entries, views):
        models = {known.name: known.keys for known in (*members, *ensembles, entry)}
        try:
            trial = parse_config({"models": models}, source=source)
            rehearse(trial, files=files).check(trial)
        except ConfigError as exc:
            notes.append(f"no {entry.name}: {exc}")
        else:
            ensembles.append(entry)
    engine, comment = _engine(fitted, machine) if views else ({}, "")
    return Proposal(members, ensembles, engine, comment, notes)


# --- members -----------------------------------------------------------------------------------------------------


def _members(entries: Entries, rehearsal: Rehearsal, fitted: Fit) -> list[Entry]:
    found = []
    for name, keys in entries.hosted.items():
        dtype = {} if fitted.dtype in (None, "auto") else {"dtype": fitted.dtype}
        found.append(Entry(name, {**keys, **dtype}, _described(rehearsal, name)))
    for name, keys in entries.adapters.items():
        what = "delta" if "delta" in keys else "LoRA adapter"
        found.append(Entry(name, keys, f"a {what}, on the weights of {keys['base']}, which are loaded once"))
    for name, keys in entries.remotes.items():
        found.append(Entry(name, keys, "answers over HTTP; its probabilities cannot be averaged"))
    return found


def _described(rehearsal: Rehearsal, name: str) -> str:
    """ "llama, 134.5 M parameters stored as bfloat16, context 8192; chat template, answers end with <|im_end|>" """
    folder, view = rehearsal.files.checkpoints[name], rehearsal.files.views[name]
    config = read_config(folder)
    parts = [str(config.get("model_type", "of an unnamed architecture"))]
    try:
        weights = read_weights(folder)
        stored = config.get("dtype") or config.get("torch_dtype")
        parts.append(f"{as_count(weights.num_parameters)} parameters" + (f" stored as {stored}" if stored else ""))
        if (positions := read_shape(folder).max_positions) is not None:
            parts.append(f"context {positions}")
    except ModelLoadError as exc:
        parts.append(f"size unknown ({exc})")
    talks = "chat template" if view.surface.has_chat_template else "no chat template: for /v1/completions only"
    ends = [view.surface.bytes_of(token_id).decode(errors="replace") for token_id in sorted(view.eos_ids)]
    return f"{', '.join(parts)}; {talks}" + (f", answers end with {' or '.join(ends)}" if ends else "")


def _family_notes(views: Mapping[str, MemberView]) -> list[str]:
    """Which vocabularies are equal, extended or different."""
    if len(views) < 2:
        return []
    notes = []
    groups = families(views)
    for group in groups:
        family = family_of([views[name] for name in group])
        listed = ", ".join(group)
        if family.is_uniform:
            notes.append(f"{listed}: one vocabulary of {family.width} tokens")
            continue
        texts = [
            views[group[owner]].surface.bytes_of(token_id).decode(errors="replace")
            for token_id, owner in family.added.items()
        ]
        shown = ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
        lacking = [name for name, ids in zip(group, family.lacking, strict=True) if ids]
        notes.append(f"{listed}: one vocabulary but for {shown}, which {' and '.join(lacking)} lack; they are averaged")
    if len(groups) > 1:
        notes.append(f"different vocabularies: {' | '.join(', '.join(group) for group in groups)}")
    return notes


def _likeness_notes(checkpoints: Mapping[str, Path]) -> list[str]:
    """Which models may be full fine-tunes of one base: those of one architecture, shape and size."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, folder in checkpoints.items():
        try:
            weights, shape, config = read_weights(folder), read_shape(folder), read_config(folder)
        except ModelLoadError:
            continue
        if "quantization_config" not in config:
            alike.setdefault((config.get("model_type"), weights.num_parameters, shape), []).append(name)
    return [
        f"{', '.join(names)}: one architecture and size; if they are fine-tunes of one base, `ensemble compress` makes "
        "small deltas of them that share its weights (docs/deltas.md)"
        for names in alike.values()
        if len(names) > 1
    ]


def families(views: Mapping[str, MemberView]) -> list[list[str]]:
    """The members in groups of one vocabulary, or of vocabularies that extend each other."""
    groups: list[list[str]] = []
    for name in views:
        for group in groups:
            try:
                family_of([views[other] for other in (*group, name)])
            except ModelLoadError:
                continue
            group.append(name)
            break
        else:
            groups.append([name])
    return groups


# --- ensembles ---------------------------------------------------------------------------------------------------


def _suitable(entries: Entries, views: Mapping[str, MemberView]) -> list[Entry]:
    """The methods that fit these members, the first of which is the one to try first."""
    taken = set(entries.all)

    def named(wanted: str) -> str:
        name = next(name for name in (wanted, f"{wanted}-ensemble", f"the-{wanted}") if name not in taken)
        taken.add(name)
        return name

    hosted = list(views)
    chatting = [name for name in hosted if views[name].surface.has_chat_template] + list(entries.remotes)
    found = []
    if len(hosted) > 1:
        found += _averages(hosted, views, named)
    elif chatting and hosted:
        found += _prompts(hosted[0], named)
    if len(chatting) > 1:
        votes = {"members": chatting, "similarity": {"rouge_l_word": 1}}
        found += [
            Entry(
                named("crowd"),
                {"method": "crowd_vote", **votes},
                "every member answers; the answer most like all the others is the reply",
            ),
            Entry(
                named("fused"),
                {"method": "answer_fusion", "members": chatting, "aggregator": chatting[0]},
                f"{chatting[0]} writes the reply from what all propose; let the best writer of them be the aggregator",
            ),
        ]
    if chatting:
        found.append(
            Entry(
                named("majority"),
                {
                    "method": "majority",
                    "members": chatting,
                    "samples": 5 if len(chatting) == 1 else 3,
                    "answer": "number",
                },
                "for short answers: the value found most often wins. answer: number | choice | yes_no | text",
            )
        )
    return found


def _averages(hosted: Sequence[str], views: Mapping[str, MemberView], named: Any) -> list[Entry]:
    """Averages over all members; where their vocabularies differ also over each group of one vocabulary."""
    groups = [list(hosted)]
    if len(families(views)) > 1:
        groups += [group for group in families(views) if len(group) > 1]
    found = []
    for index, group in enumerate(groups):
        suffix = "" if index == 0 else f"-{group[0]}"
        found += [
            Entry(
                named(f"mix{suffix}"),
                {"method": "probability_average", "members": list(group)},
                "the plain average of the members' next-token probabilities",
            ),
            Entry(
                named(f"adaptive{suffix}"),
                {"method": "probability_average", "members": list(group), "pool": "posterior", "share": 0.01},
                "an average whose weights follow the text: who predicted it well so far counts more",
            ),
        ]
    return found


def _prompts(member: str, named: Any) -> list[Entry]:
    """One model under two system prompts, averaged."""
    careful = named("careful")
    return [
        Entry(
            careful,
            {
                "base": member,
                "system_prompt": "Think about what could be wrong before you answer.",
                "listed": False,
            },
            f"{member} under a system prompt of its own; its weights are loaded once",
        ),
        Entry(
            named("mix"),
            {"method": "probability_average", "members": [member, careful]},
            "one model under several system prompts, averaged at every token",
        ),
    ]


# --- the engine --------------------------------------------------------------------------------------------------


def _engine(fitted: Fit, machine: Machine) -> tuple[dict[str, Any], str]:
    free = f"{as_bytes(machine.free_bytes)} free on {machine.device}"
    size = f"{as_bytes(fitted.num_bytes)} with full caches, of {free}"
    engine = {"max_batch": fitted.max_batch, "max_context": fitted.max_context}
    if fitted.dtype is None:
        return engine, f"these models do not fit: {size}. Leave some out, or take quantised or smaller ones"
    reason = "" if fitted.is_full else "; fewer sequences at once or a shorter context than usual, so that all fits"
    dtype = (
        "float32 because this CPU computes 16-bit numbers slowly" if fitted.dtype == "float32" else "weights as stored"
    )
    return engine, f"{size}; {dtype}{reason}"
