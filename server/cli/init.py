"""`ensemble init`: looks at models and writes a config for them that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def init(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH|HUB_ID|GGUF|ADAPTER|URL]...",
            help="Model folders, .gguf files, LoRA adapters, Hugging Face ids, addresses of OpenAI-compatible servers.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("ensemble.yaml"),
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key of the servers.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take every model that is found.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Look at models and write a commented config for them: members, ensembles that fit, an engine that fits here.

    Without arguments it looks in this folder and two levels below it; where nothing is, among models of the Hugging
    Face cache and of installed packages.
    """
    from ensemble_server.server.proposal.machine import this_machine
    from ensemble_server.server.proposal.proposal import propose
    from ensemble_server.server.proposal.sources import entries_of
    from ensemble_server.server.proposal.written import as_yaml

    if output.exists() and not force:
        raise typer.BadParameter(f"{output} is there already; give another name, or --force", param_hint="--output")
    chosen = targets or _looked_for(yes)
    source = output.absolute()
    given = [_seen_from(target, source.parent) for target in chosen]
    entries = entries_of(given, folder=source.parent, api_key_env=api_key_env)
    proposal = propose(entries, source=source, machine=this_machine())
    proposal.as_config(source)  # it will load
    output.write_text(as_yaml(proposal), encoding="utf-8")

    for entry in (*proposal.members, *proposal.ensembles):
        typer.echo(f"{entry.name}: {entry.comment}")
    for note in proposal.notes:
        typer.echo(f"- {note}")
    if proposal.engine_comment:
        typer.echo(f"- {proposal.engine_comment}")
    typer.echo(
        f"\nWrote {output}. Next:\n\n"
        f"  ensemble models {output}    # what is in it\n"
        f"  ensemble chat {output}      # talk to it here\n"
        f"  ensemble serve {output}     # an OpenAI-compatible server"
    )


def _seen_from(target: str, folder: Path) -> str:
    """A path as given in the working folder, for a config that lies elsewhere; what is no path stays."""
    path = Path(target).expanduser()
    return str(path.absolute()) if path.exists() and not path.is_absolute() and folder != Path.cwd() else target


def _looked_for(yes: bool) -> list[str]:
    """What there is, as the user chooses. Raises `BadParameter` if there is nothing, or nobody to be asked."""
    from ensemble_server.server.proposal.sources import found_around, found_elsewhere

    found = found_around(Path.cwd()) or found_elsewhere()
    if not found:
        raise typer.BadParameter("no model is in this folder, in the Hugging Face cache or in a package; name some")
    if yes:
        return found
    for number, target in enumerate(found, start=1):
        typer.echo(f"{number:3}  {target}")
    if not sys.stdin.isatty():
        raise typer.BadParameter("name those that you want, or give --yes for all of them")
    while True:
        answer = typer.prompt("Which? Numbers, or all", default="all")
        try:
            wanted = [found[int(word) - 1] for word in answer.replace(",", " ").split()] if answer != "all" else found
        except (ValueError, IndexError):
            typer.echo(f"numbers from 1 to {len(found)}, or all")
            continue
        return wanted
