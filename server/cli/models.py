"""`ensemble models`: what a config holds, checked, with sizes, before anything large is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

    from ensemble_server.ensembles.method import MethodConfig
    from ensemble_server.server.config.blocks import Config, HostedModel, ModelEntry

NOT_SETTINGS = {"method", "members", "listed"}


def models(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The YAML file.", metavar="CONFIG")],
) -> None:
    """Show what a config holds: kinds, members, parameters and memory. Exit code 1 if a model cannot be loaded.

    Reads headers, not weights. A .gguf file is converted on the way, once; nothing is downloaded.
    """
    from rich.console import Console

    from ensemble_server.server.config.loading import load_config

    loaded = load_config(config)
    sizes, problems = _sizes(loaded)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width of its own; cells should not wrap there
    console.print(_table(loaded, sizes))
    console.print(_total(loaded, sizes), highlight=False)
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Size:
    """Of one hosted member. `num_bytes`: of weights that are its own; `kv_bytes`: of the cache of one full sequence.

    `storage` is equal for members whose own weights are one copy in memory.
    """

    storage: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    kv_bytes: int
    context: int


def _sizes(config: Config) -> tuple[dict[str, _Size], list[str]]:
    """The size of each hosted member that can be loaded, and why the others cannot."""
    from ensemble_server.ensembles.errors import ModelLoadError
    from ensemble_server.server.config.blocks import HostedModel

    sizes: dict[str, _Size] = {}
    problems: list[str] = []
    for name, model in config.models.items():
        if isinstance(model, HostedModel):
            try:
                sizes[name] = _size(model, config)
            except ModelLoadError as exc:
                problems.append(f"model {name!r}: {exc}")
    return sizes, problems


def _size(model: HostedModel, config: Config) -> _Size:
    from ensemble_server.server.weights.checkpoints import resolve_checkpoint
    from ensemble_server.server.weights.footprint import DTYPE_BYTES, Weights, read_shape, read_weights

    root = model if model.base is None else config.models[model.base]
    folder = resolve_checkpoint(root.path, relative_to=config.source.parent, may_download=False)
    base, shape = read_weights(folder), read_shape(folder)
    storage: tuple[str, ...] = (str(folder), root.dtype, root.device)
    own = base
    if model.base is not None:
        own = read_weights(Path(model.adapter)) if model.adapter is not None else Weights(0, 0)
        storage += (model.adapter or "",)
    context = min(config.engine.max_context, shape.max_positions or config.engine.max_context)
    # Weights may be quantised; caches have 16 bits at least.
    bytes_per_number = DTYPE_BYTES.get(root.dtype) or max(2, round(base.num_bytes / base.num_parameters))
    return _Size(
        storage, own.num_parameters, own.bytes_as(root.dtype), shape.kv_bytes(context, bytes_per_number), context
    )


def _table(config: Config, sizes: Mapping[str, _Size]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{config.source}", title_justify="left", title_style="bold")
    for header in ("model", "kind", "made of", "settings"):
        table.add_column(header, overflow="fold")
    for header in ("parameters", "weights", "KV cache", "context"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, model in config.models.items():
        size = sizes.get(name)
        numbers = (
            [_count(size.num_parameters), _bytes(size.num_bytes), _bytes(size.kv_bytes), str(size.context)]
            if size
            else []
        )
        cells = [name if model.listed else f"{name} (hidden)", *_described(model), *numbers]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _described(model: ModelEntry) -> tuple[str, str, str]:
    """Kind, what it is made of, and its other settings."""
    from ensemble_server.server.config.blocks import HostedModel, RemoteModel

    if isinstance(model, RemoteModel):
        return "remote", model.url, _settings(model, {"url", "listed"})
    if not isinstance(model, HostedModel):
        return model.method, _members(model), _settings(model, NOT_SETTINGS)
    if model.path is not None:
        return "hosted", model.path, _settings(model, {"path", "listed"})
    kind = "view" if model.adapter is None else "adapter"
    made_of = str(model.base) if model.adapter is None else f"{model.base} + {Path(model.adapter).name}"
    return kind, made_of, _settings(model, {"base", "adapter", "listed"})


def _members(config: MethodConfig) -> str:
    """{"base": 1.0, "code": 2.0} -> "base, code x2" """

    def named(name: str, weight: Any) -> str:
        return f"{name} x{weight:g}" if isinstance(weight, float) and weight != 1 else name

    return ", ".join(named(name, weight) for name, weight in config.members.items())


def _settings(block: BaseModel, besides: set[str]) -> str:
    """The keys that the config sets, less those that are shown elsewhere: "pool=posterior share=0.01"."""
    keys = [key for key in type(block).model_fields if key in block.model_fields_set - besides]
    return " ".join(f"{key}={_shortened(str(getattr(block, key)))}" for key in keys)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


def _total(config: Config, sizes: Mapping[str, _Size]) -> str:
    num_sequences = config.engine.max_batch
    weights = {size.storage: size.num_bytes for size in sizes.values()}
    cache = num_sequences * sum(size.kv_bytes for size in sizes.values())
    return (
        f"Weights: {_bytes(sum(weights.values()))} in all. KV cache: in the table for one sequence of full context; "
        f"at most {_bytes(cache)} with {num_sequences} of them (engine.max_batch) on every member at once."
    )


def _count(number: int) -> str:
    """134515008 -> "134.5 M" """
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _bytes(number: int) -> str:
    """538060032 -> "538.1 MB" """
    return f"{_count(number)}B" if number >= 1000 else f"{number} B"
