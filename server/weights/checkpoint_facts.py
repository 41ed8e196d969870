"""What a checkpoint's own files say that every engine goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError


def max_positions(text_config: Any) -> int | None:
    """The context that a model was built for, if its config says so.

    With longrope it is the one before the extension: beyond, the longest row would change the rotation of them all.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(text_config, "max_position_embeddings", None)


def id_set(value: int | list[int] | None) -> frozenset[int]:
    """Token ids as configs and tokenizers write them: one, several or none."""
    return frozenset([value] if isinstance(value, int) else value or [])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises `ModelLoadError` if it cannot be read."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{file} cannot be read ({exc})") from exc
