"""`ensemble export`: a probability average as one model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ensemble_server.server.cli.completion import ensemble_names
from ensemble_server.server.cli.paths import text_file


def export(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, callback=text_file, help="The YAML file.", metavar="CONFIG")
    ],
    name: Annotated[
        str,
        typer.Argument(
            help="Which of its models: a probability_average.", metavar="NAME", autocompletion=ensemble_names
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="An empty folder, or one to be made.", metavar="DIR")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the members' weights into DIR instead of referring to them.")
    ] = False,
) -> None:
    """Write an ensemble as ONE model directory that transformers and vLLM load: generate(), lm-eval, vllm serve."""
    from ensemble_server.server.config.averages import average_of
    from ensemble_server.server.config.loading import load_config

    parsed = load_config(config)
    average_of(parsed, name)  # a wrong name is told before transformers is imported
    from ensemble_server.server.one_model.export import export as write

    write(parsed, name, folder, copy=copy)
    typer.echo(
        f"Wrote {folder}. Load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True), "
        f"or with `vllm serve {folder}` where ensemble-server is installed beside vLLM."
    )
