"""`ensemble COMMAND ...`: the table of commands, and how errors and exit codes leave the process.

Exit codes: 0 done, 1 failed, 2 called wrongly. A new command is one file in this folder and one row in `COMMANDS`; its
function is a typer command and imports what is heavy (torch, transformers) inside, so that `--help` answers at once.
A command may have two words: `ensemble batch merge ...` runs the row "batch merge", any other `ensemble batch ...` the
row "batch".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS: dict[str, str] = {
    "init": "ensemble_server.server.cli.init:init",
    "serve": "ensemble_server.server.cli.serve:serve",
    "chat": "ensemble_server.server.cli.chat:chat",
    "models": "ensemble_server.server.cli.models:models",
    "batch": "ensemble_server.server.cli.batch:batch",
    "batch merge": "ensemble_server.server.cli.batch_merge:merge",
    "batch submission": "ensemble_server.server.cli.batch_submission:submission",
    "usage": "ensemble_server.server.cli.usage:usage",
    "vote": "ensemble_server.server.cli.vote:vote",
    "replay": "ensemble_server.server.cli.replay:replay",
    "fit": "ensemble_server.server.cli.fit:fit",
    "compare": "ensemble_server.server.cli.compare:compare",
    "merge": "ensemble_server.server.cli.merge:merge",
    "distill": "ensemble_server.server.cli.distill:distill",
    "compress": "ensemble_server.server.cli.compress:compress",
    "export": "ensemble_server.server.cli.export:export",
    "doctor": "ensemble_server.server.cli.doctor:doctor",
    "version": "ensemble_server.server.cli.version:print_versions",
}


class _BareFlags:
    """Help shows what an option takes; a flag takes nothing, so it has no type there."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(_BareFlags, TyperCommand):
    pass


class _LazyCommands(Mapping[str, Any]):
    """`COMMANDS` as typer sees it: a command's module is imported when that command is looked at."""

    def __getitem__(self, name: str) -> Any:
        module, _, function = COMMANDS[name].partition(":")
        command = typer.Typer(add_completion=False, rich_markup_mode="rich")
        command.command(name, cls=_Command)(getattr(import_module(module), function))
        return typer.main.get_command(command)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _CommandGroup(_BareFlags, TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LazyCommands()

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command of the first two words where there is one, else that of the first."""
        if len(args) > 1 and (name := f"{args[0]} {args[1]}") in COMMANDS:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_CommandGroup,
    help="Several language models answer as one, behind an OpenAI-compatible API.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ensemble-server {version('ensemble-server')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Goes anywhere in the line.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Only declares its options: `main` acts on --debug, which must outlive the command."""


def main() -> None:
    """Run the command line and exit. An error is one line on stderr and exit code 1; with --debug, a traceback.

    A command that was interrupted while weights were being loaded does not wait for them.
    """
    try:
        _run()
    except SystemExit as end:
        from ensemble_server.server.weights.threads import has_unfinished_threads

        if has_unfinished_threads():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _keep_bars_out_of_files()
    try:
        app(arguments, prog_name="ensemble")
    except Exception as exc:
        if len(arguments) < len(sys.argv) - 1:
            raise
        typer.echo(f"error: {_described(exc)}", err=True)
        sys.exit(1)


def _keep_bars_out_of_files() -> None:
    """Bars of libraries that load, download or measure are for a terminal. The variables are read when those are
    imported, which is later."""
    if not sys.stderr.isatty():
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(variable, "1")


def _described(exc: Exception) -> str:
    """The message of an error that is meant for users; any other with its class, and how to learn more."""
    from ensemble_server.ensembles.errors import EnsembleError

    if isinstance(exc, EnsembleError | OSError):
        return str(exc)
    return f"{type(exc).__name__}: {exc} (run again with --debug for the traceback)"
