"""`ensemble merge`: one model out of several. Exit codes: 0 done, 1 failed, 2 called wrongly."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="RECIPE",
            help="mergekit's YAML, or that of mergekit-moe. Its models are folders, hub ids, or names from --config.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model; must not exist, or be empty.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", exists=True, dir_okay=False, help="Config whose hosted models may be merged."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the methods that draw random numbers: dare_*, della*.")] = 0,
) -> None:
    """Merge the weights of several models into one, check it, and write it as an ordinary model folder.

    LoRA members of the config are folded into their base first. The same merge is made once and then copied from the
    cache ($ENSEMBLE_CACHE).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is there already and not empty", param_hint="--out")
    from ensemble_server.server.compare.merges.merging import build_merge
    from ensemble_server.server.config.loading import load_config

    loaded = None if config is None else load_config(config)
    with _progress() as say:
        merged = build_merge(recipe, loaded, seed=seed, on_stage=say)
        say("copying")
        _copy(merged, out)
    name = out.name.replace(" ", "-")
    typer.echo(f"{out}: merged and checked. In a config: models: {{{name}: {{path: {out.absolute()}}}}}")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says each stage on standard error: a spinner on a terminal, a line each elsewhere."""
    if not sys.stderr.isatty():
        yield lambda stage: typer.echo(stage, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("reading the recipe") as status:
        yield lambda stage: status.update(stage)


def _copy(merged: Path, out: Path) -> None:
    """Copy beside `out` and rename, so that an interrupted copy is not taken for a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copytree(merged, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
