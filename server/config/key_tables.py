"""Writes the tables of `configs/README.md` from the blocks of the config themselves, so that no key is left out.

    python -m ensemble_server.server.config.key_tables configs/README.md

Everything between `<!-- keys: NAME -->` and `<!-- end -->` is replaced; the text around it is written by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.registry import METHODS, method_class
from ensemble_server.server.config.blocks import (
    BatchConfig,
    EmbeddingConfig,
    EngineConfig,
    HostedModel,
    KeyLimits,
    NamedKey,
    RemoteModel,
    ServerConfig,
    VllmEngineConfig,
)
from ensemble_server.server.config.values import Unit

BLOCKS: dict[str, type[BaseModel]] = {
    "hosted": HostedModel,
    "remote": RemoteModel,
    "ensemble": MethodConfig,
    "server": ServerConfig,
    "key_limits": KeyLimits,
    "named_key": NamedKey,
    "engine": EngineConfig,
    "vllm_engine": VllmEngineConfig,
    "embedding": EmbeddingConfig,
    "batch": BatchConfig,
}
_SECTION = re.compile(r"(<!-- keys: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(readme: str) -> str:
    """`readme` with every marked section written anew. Raises `KeyError` for a mark that names no block."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        without = frozenset(KeyLimits.model_fields) if name == "named_key" else frozenset()
        body = "\n\n".join(_methods()) if name == "methods" else table(BLOCKS[name], without=without)
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return _SECTION.sub(section, readme)


def table(block: type[BaseModel], *, without: frozenset[str] = frozenset()) -> str:
    """One row per key of `block`: its values, unit, default and meaning."""
    rows = ["| key | value | unit | default | meaning |", "|---|---|---|---|---|"]
    for name, field in block.model_fields.items():
        if name not in without:
            cells = [
                f"`{name}`",
                _values(field.annotation),
                _unit(name, field),
                _default(field),
                field.description or "",
            ]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _methods() -> Iterator[str]:
    for name in METHODS:
        cls = method_class(name)
        module = inspect.getmodule(cls)
        summary = " ".join((module.__doc__ or "").split("\n\n")[0].split()) if module else ""
        own = table(cls.Config, without=frozenset(MethodConfig.model_fields))
        yield f"### `{name}`\n\n{summary}\n\n{own}"


def _values(annotation: Any) -> str:
    """Literal["a", "b"] | None -> `a`, `b`;  dict[str, float] -> map"""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, type) and not arguments:
        if issubclass(annotation, BaseModel):
            return "map"
        return {str: "text", bool: "true, false", int: "whole number", float: "number"}.get(
            annotation, annotation.__name__
        )
    origin = get_origin(annotation)
    if origin in {list, tuple}:
        return "list"
    if isinstance(origin, type) and issubclass(origin, dict):
        return "map"
    if hasattr(annotation, "__metadata__"):
        return _values(arguments[0])
    branches = [_values(branch) for branch in arguments if branch is not NoneType]
    return " or ".join(dict.fromkeys(branches))


def _unit(name: str, field: FieldInfo) -> str:
    units = [mark.name for mark in _marks(field.annotation, field.metadata) if isinstance(mark, Unit)]
    if units:
        return units[0]
    return "seconds" if name.endswith("_s") else "bytes" if name.endswith("_bytes") else ""


def _marks(annotation: Any, found: list[Any]) -> Iterator[Any]:
    """The marks of a field's own annotation and of the branches of a union in it."""
    yield from found
    for branch in get_args(annotation):
        yield from _marks(branch, list(getattr(branch, "__metadata__", ())))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return "none"
    if isinstance(value, list | tuple | dict):
        return "empty" if not value else f"`{value}`"
    return f"`{value}`"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
