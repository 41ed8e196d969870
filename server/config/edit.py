"""Weights written into a config file, with everything else in it left as it is: comments, order, quotes, blank lines.

The YAML is parsed for where things stand, and only the characters of the values are replaced. Afterwards the new text
is parsed again: it must say the old thing in every other place, or nothing is written. What is written by reference (an
alias, a merge key) is refused, because it would change other entries, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from ensemble_server.ensembles.errors import ConfigError


def with_weights(text: str, model: str, weights: Mapping[str, float]) -> str:
    """`text`, a config, with these weights for the members of `models.<model>`.

    `weights` must name exactly the entry's members. Raises `ConfigError` if they cannot be put in by changing that
    entry alone.
    """
    root, entry = _entry(text, model)
    members = _value(entry, "members", f"models.{model}")
    _check_alone(root, [entry, members], model)
    key = _key(entry, "members")
    assert key is not None, "`members` has a value, so it is a key of the entry"
    edits = _member_edits(text, key, members, weights, model)
    numbers = {name: float(_number(weight)) for name, weight in weights.items()}
    return _edited(text, root, model, edits, {"members": numbers})


def with_share(text: str, model: str, share: float) -> str:
    """`text`, a config, with this share for the posterior pool `models.<model>`. Raises as `with_weights` does."""
    root, entry = _entry(text, model)
    _check_alone(root, [entry], model)
    assert isinstance(entry, yaml.MappingNode), "a model with a share is a map of its keys"
    return _edited(
        text, root, model, [_entry_edit(entry, "share", _number(share), model)], {"share": float(_number(share))}
    )


def with_gate(text: str, model: str, share: float, path: str) -> str:
    """`text`, a config, whose posterior pool `models.<model>` has this share and the gate in the file `path`. Raises as
    `with_weights` does."""
    text = with_share(text, model, share)
    root, entry = _entry(text, model)
    assert isinstance(entry, yaml.MappingNode), "a model with a share is a map of its keys"
    return _edited(text, root, model, [_entry_edit(entry, "gate", json.dumps(path), model)], {"gate": path})


Edit = tuple[int, int, str]  # characters from, to, and what comes in their place


def _entry(text: str, model: str) -> tuple[yaml.Node, yaml.Node]:
    """The whole document, and the entry of the model."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return root, _value(_value(root, "models", "the config"), model, "models")


def _edited(text: str, root: yaml.Node, model: str, edits: Iterable[Edit], changes: Mapping[str, Any]) -> str:
    """`text` after the edits. Raises `ConfigError` unless it says the old thing but for the entry's `changes`."""
    expected = yaml.SafeLoader("").construct_document(root)
    expected["models"][model] = {**expected["models"][model], **changes}
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if yaml.safe_load(text) != expected:
        raise ConfigError(
            f"models.{model}: is written in a way that cannot be edited safely; put this in by hand: {dict(changes)}"
        )
    return text


def _member_edits(
    text: str, key: yaml.Node, members: yaml.Node, weights: Mapping[str, float], model: str
) -> Iterator[Edit]:
    """A map gets new numbers; a list becomes a map, item by item, in its own style."""
    names = [item.value for item in (members.value if isinstance(members, yaml.SequenceNode) else ())]
    if isinstance(members, yaml.MappingNode):
        names = [name.value for name, _ in members.value]
    if set(names) != set(weights):
        raise ConfigError(f"models.{model}.members: has {', '.join(names)}; the weights are of {', '.join(weights)}")
    if isinstance(members, yaml.MappingNode):
        for name, weight in members.value:
            yield weight.start_mark.index, weight.end_mark.index, _number(weights[name.value])
        return
    assert isinstance(members, yaml.SequenceNode), "what names the members is a map or a list"
    for item in members.value:
        quoted = text[item.start_mark.index : item.end_mark.index]
        new = f"{quoted}: {_number(weights[item.value])}"
        start = item.start_mark.index
        if not members.flow_style:  # "- base" becomes "base: 0.5"; a map stands deeper than its key, a list need not
            start = text.rindex("-", 0, start)
            column = start - (text.rfind("\n", 0, start) + 1)
            new = " " * max(0, key.start_mark.column + 2 - column) + new
        yield start, item.end_mark.index, new
    if members.flow_style:
        yield members.start_mark.index, members.start_mark.index + 1, "{"
        yield members.end_mark.index - 1, members.end_mark.index, "}"


def _entry_edit(entry: yaml.MappingNode, name: str, written: str, model: str) -> Edit:
    """The key `name` of a posterior pool with this value: in the place of its old one, or before `pool`."""
    for key, value in entry.value:
        if key.value == name:
            return value.start_mark.index, value.end_mark.index, written
    before = _key(entry, "pool")
    if before is None:
        raise ConfigError(f"models.{model}: has no key `pool`, so it is not a posterior pool and has no {name}")
    start = before.start_mark.index
    gap = ", " if entry.flow_style else "\n" + " " * before.start_mark.column
    return start, start, f"{name}: {written}{gap}"


def _number(value: float) -> str:
    """Four decimals, as many as are needed: 0.25 -> "0.25", -0.00001 -> "0" """
    rounded = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if float(rounded) == 0 else rounded


def _key(node: yaml.Node, name: str) -> yaml.Node | None:
    return next((key for key, _ in node.value if key.value == name), None)


def _value(node: yaml.Node | None, name: str, where: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == name:
                return value
    raise ConfigError(f"{where}: {name!r} is not written there (perhaps it comes from `<<`); write it out")


def _check_alone(root: yaml.Node, edited: list[yaml.Node], model: str) -> None:
    """Raise `ConfigError` if another place of the YAML refers to what would be edited."""
    seen: dict[int, int] = {}

    def count(node: yaml.Node) -> None:
        seen[id(node)] = seen.get(id(node), 0) + 1
        if seen[id(node)] > 1:
            return
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            for part in child if isinstance(child, tuple) else (child,):
                count(part)

    count(root)
    if any(seen[id(node)] > 1 for node in edited):
        raise ConfigError(
            f"models.{model}: is written with a YAML alias that other entries use, too; write its members out"
        )
