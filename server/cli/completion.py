"""What the shell completes beside commands and options: names of models, as the config or the server on the line has
them. What cannot be read or reached completes to nothing: a shell is no place for errors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

SECONDS_FOR_A_SERVER = 2.0


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """The models' names that begin with `incomplete`; of a list with commas, its last name goes on."""
    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in _names(context.params) if name.startswith(last)]


def ensemble_names(context: typer.Context, incomplete: str) -> list[str]:
    """Of the config on the line, the averages that can be fitted or written down as one model."""
    return [name for name in _names(context.params, method="probability_average") if name.startswith(incomplete)]


def _names(given: dict[str, Any], *, method: str | None = None) -> list[str]:
    from ensemble_server.ensembles.errors import EnsembleError

    target = str(next(iter(_targets(given)), ""))
    try:
        if target.startswith(("http://", "https://")):
            from ensemble_server.server.cli.partner import base_of, served_models

            key = given.get("api_key_env")
            served = asyncio.run(served_models(base_of(target), key, timeout_s=SECONDS_FOR_A_SERVER))
            return [model["id"] for model in served]
        if Path(target).is_file():
            from ensemble_server.server.config.loading import load_config

            models = load_config(Path(target)).models
            return [name for name, model in models.items() if method in (None, getattr(model, "method", None))]
    except (EnsembleError, OSError):
        pass
    return []


def _targets(given: dict[str, Any]) -> Iterable[Any]:
    """What stands on the line already as a config or an address, whatever the command calls it.

    subtle: while an option waits for its value the parser gives up before it reads arguments, so the words are looked
    at, too.
    """
    for key in ("targets", "config"):
        value = given.get(key)
        yield from value if isinstance(value, list | tuple) else () if value is None else (value,)
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")  # zsh and fish; bash
    yield from (word for word in line.split() if word.endswith((".yaml", ".yml")) or word.startswith("http"))
