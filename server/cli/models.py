"""`ensemble models`: what a config holds, checked, with sizes, before anything large is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ensemble_server.server.cli.paths import text_file


def models(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, callback=text_file, help="The YAML file.", metavar="CONFIG")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes, in place of the table.")] = False,
) -> None:
    """Show what a config holds: kinds, members, parameters and memory. Exit code 1 if something cannot be served.

    Checks all that configs, tokenizers and headers can tell: models that are not there, members that cannot be
    averaged, keys that are not set. Reads no weights. A .gguf file is converted on the way, once;
    nothing is downloaded.
    """
    from ensemble_server.server.config.loading import load_config

    loaded = load_config(config)  # before what imports transformers: a wrong key is told in a second

    from ensemble_server.server.cli.model_table import as_json, print_table
    from ensemble_server.server.inventory import take_inventory
    from ensemble_server.server.rehearsal import rehearse

    rehearsal = rehearse(loaded, may_download=False)
    inventory = take_inventory(loaded, rehearsal)
    if json:
        typer.echo(as_json(inventory))
    else:
        print_table(inventory)
        for problem in rehearsal.problems:
            typer.echo(f"error: {problem}", err=True)
    if rehearsal.problems:
        raise typer.Exit(1)
