"""What entries of a config say of each other: names that exist, bases that are bases, no circles, bounded nesting."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.config.blocks import ModelEntry, ServerConfig
from ensemble_server.server.config.problems import nearest


def _members_named_in(entry: Any) -> set[str]:
    """The members of an ensemble whose block did not parse: what can be told without knowing its method."""
    members = entry.get("members") if isinstance(entry, dict) and "method" in entry else None
    return {name for name in members if isinstance(name, str)} if isinstance(members, list | dict) else set()


def reference_problems(models: Mapping[str, ModelEntry], entries: Mapping[Any, Any]) -> list[str]:
    """Names that no entry has, bases that are none, and cycles. `entries` also has those that did not parse."""
    known = [name for name in entries if isinstance(name, str)]
    problems = []
    graph: dict[str, set[str]] = {}
    for name in known:
        model = models.get(name)
        parts = model.references() if isinstance(model, MethodConfig) else _members_named_in(entries[name])
        problems += [
            f"models.{name}: refers to an unknown model {part!r}{nearest(part, known)}"
            for part in sorted(parts - set(known))
        ]
        graph[name] = parts & set(known)

    for name, entry in entries.items():
        base = entry.get("base") if isinstance(entry, dict) else None
        if not isinstance(base, str):
            continue
        if base not in entries:
            problems.append(f"models.{name}.base: there is no model {base!r}{nearest(base, known)}")
        elif not isinstance(entries[base], dict) or "path" not in entries[base]:
            problems.append(
                f"models.{name}.base: {base!r} must be an entry with `path`, so that its weights are its own"
            )

    while True:
        try:
            TopologicalSorter(graph).prepare()
            return problems
        except CycleError as exc:
            cycle = exc.args[1][::-1]  # each refers to the next
            problems.append(f"models.{cycle[0]}: an ensemble cannot contain itself: {' -> '.join(cycle)}")
            graph[cycle[0]] = graph[cycle[0]] - {cycle[1]}


def key_problems(server: ServerConfig, known: Collection[str]) -> list[str]:
    """Models that keys may ask and that no entry has, and names of keys that cannot be shown."""
    allowed = {"server.limits": server.limits} | {f"server.keys.{name}": key for name, key in server.keys.items()}
    problems = [
        f"server.keys: the name {name!r} must be printable, without spaces, and not empty"
        for name in server.keys
        if not name or not name.isprintable() or " " in name
    ]
    for place, limits in allowed.items():
        problems += [
            f"{place}.models: there is no model {name!r}{nearest(name, known)}"
            for name in limits.models or ()
            if name not in known
        ]
    return problems


def nesting_problems(models: Mapping[str, ModelEntry], limits: ServerConfig) -> list[str]:
    """Ensembles nested deeper or reaching further than `limits` allow. References must be known and without cycles."""
    graph = {name: model.references() if isinstance(model, MethodConfig) else set() for name, model in models.items()}
    depth: dict[str, int] = {}
    reach: dict[str, int] = {}
    calls: dict[str, int] = {}
    problems = []
    for name in TopologicalSorter(graph).static_order():
        depth[name] = 1 + max(depth[part] for part in graph[name]) if graph[name] else 0
        reach[name] = sum(reach[part] for part in graph[name]) if graph[name] else 1
        model = models[name]
        calls[name] = model.num_calls(calls) if isinstance(model, MethodConfig) else 1
        if depth[name] == limits.max_depth + 1:  # the first too deep: all that contain it are, too
            problems.append(f"models.{name}: is {depth[name]} ensembles deep, server.max_depth is {limits.max_depth}")
        if reach[name] > limits.max_fan_out:
            problems.append(f"models.{name}: reaches {reach[name]} members, server.max_fan_out is {limits.max_fan_out}")
        if calls[name] > limits.max_calls:
            limit = f"server.max_calls is {limits.max_calls}"
            problems.append(f"models.{name}: one reply may take {calls[name]} calls of models, {limit}")
    return problems
