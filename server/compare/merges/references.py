"""What a recipe writes where mergekit wants a model: `path[@revision][+lora]`, or a map of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: `path[@revision][+lora]`. `written`: that text, which says which are the same."""

    written: str
    path: str
    revision: str | None = None
    lora: str | None = None
    architecture: str | None = None  # mergekit's override_architecture


def parse_reference(value: Any) -> Reference:
    """mergekit's reading of a model: a string, or a map of `model`, `lora` and `override_architecture`.

    Raises `ValueError` for what is none.
    """
    is_text = isinstance(value, str)
    if is_text:
        model, *lora = value.split("+")
        if len(lora) > 1:
            raise ValueError(f"{value!r} is no model: a model takes one +lora")
        parts: Mapping[str, Any] = {"model": model, "lora": lora[0] if lora else None}
    elif isinstance(value, Mapping) and "model" in value:
        parts = value
    else:
        raise ValueError(f"{value!r} is no model; write path[+lora], or the name of a hosted model")
    path, revision = _path(parts["model"], value)
    lora_path, lora_revision = (None, None) if parts.get("lora") is None else _path(parts["lora"], value)
    if lora_revision is not None:
        raise ValueError(f"{value!r}: a revision of a LoRA is not supported; give the adapter's folder")
    architecture = parts.get("override_architecture")
    if is_text:
        written = str(value)
    else:
        stated = {
            "model": {"path": path, "revision": revision},
            "lora": None if lora_path is None else {"path": lora_path, "revision": None},
            "override_architecture": architecture,
        }
        written = json.dumps(stated, sort_keys=True)
    return Reference(written, path, revision, lora_path, None if architecture is None else str(architecture))


def _path(value: Any, whole: Any) -> tuple[str, str | None]:
    """ "path@revision", or a map of these -> path, revision"""
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return str(value["path"]), value.get("revision")
    if not isinstance(value, str) or value.count("@") > 1:
        raise ValueError(f"{whole!r} is no model; write path[@revision][+lora], or the name of a hosted model")
    path, _, revision = value.partition("@")
    return path, revision or None
