"""`ensemble replay`: an exchange once more from its transcript, without any model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ensemble_server.ensembles.exchange.transcript import State, Transcript

TRANSCRIPT_KEYS = {"settings", "rounds", "states"}


def replay(
    transcript: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="TRANSCRIPT",
            help="JSON: the trace of an exchange, or a whole response to a request that asked to explain.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON line per exchange instead of tables.")
    ] = False,
) -> None:
    """Work out an exchange's stops and its answer again from what was said, and show them round by round.

    Exit code 1 if they differ from those that the transcript records.
    """
    from rich.console import Console

    from ensemble_server.ensembles.exchange import agreement

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; cells should not wrap there
    num_differing = 0
    for read in _read(transcript):
        states, differences = agreement.replay(read)
        if as_json:
            typer.echo(json.dumps(_summary(read, states, differences), ensure_ascii=False))
        else:
            console.print(_table(read, states))
            console.print(_verdict(read, states), highlight=False, markup=False)
        for difference in differences:
            typer.echo(f"differs: {difference}", err=True)
        num_differing += bool(differences)
    if num_differing:
        raise typer.Exit(1)


def _read(path: Path) -> list[Transcript]:
    """Raises `ConfigError` if there is no transcript, or one that is not whole."""
    from pydantic import ValidationError

    from ensemble_server.ensembles.errors import ConfigError
    from ensemble_server.ensembles.exchange.transcript import Transcript

    try:
        found = list(_transcripts_in(json.loads(path.read_bytes())))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: is no JSON ({exc})") from exc
    if not found:
        raise ConfigError(
            f"{path}: holds no transcript; save the trace of an answer to a request with "
            '"ensemble": {"explain": true} to an exchange_of_thought model, or the whole answer'
        )
    try:
        return [Transcript.model_validate(value) for value in found]
    except ValidationError as exc:
        finding = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in finding["loc"])
        raise ConfigError(f"{path}: the transcript is not whole: {where}: {finding['msg']}") from exc


def _transcripts_in(value: Any) -> Iterator[Any]:
    """The outermost transcripts in a JSON value; those of participants that are exchanges themselves stay inside."""
    if isinstance(value, dict) and value.keys() >= TRANSCRIPT_KEYS:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _transcripts_in(inner)


def _final_text(transcript: Transcript, states: list[State]) -> str:
    rounds = transcript.rounds[: len(states)]
    speaker = states[-1].spokesperson
    return next(round_.replies[speaker].said for round_ in reversed(rounds) if speaker in round_.replies)


def _summary(transcript: Transcript, states: list[State], differences: list[str]) -> dict[str, Any]:
    return {
        "stop": states[-1].stop,
        "rounds": len(states),
        "answer": states[-1].answer,
        "spokesperson": states[-1].spokesperson,
        "votes": states[-1].votes,
        "text": _final_text(transcript, states),
        "differences": differences,
    }


def _table(transcript: Transcript, states: list[State]) -> Table:
    """A row for each round, a column for each participant: its answer and its confidence so far."""
    from rich.table import Table
    from rich.text import Text

    settings = transcript.settings
    table = Table(title=f"{settings.topology or 'own'} topology, stop: {', '.join(settings.stop) or 'never'}")
    table.add_column("round", justify="right")
    for name in settings.names:
        table.add_column(Text(name), overflow="fold")
    for index, state in enumerate(states):
        round_ = transcript.rounds[index]
        cells = []
        for name in settings.names:
            if name in round_.replies:
                answer = round_.replies[name].answer
                cells.append(f"{'no answer' if answer is None else answer} ({state.confidence[name]:.2f})")
            else:
                cells.append(f"silent: {round_.silent[name]}" if name in round_.silent else "")
        table.add_row(str(index), *(Text(cell) for cell in cells))
    return table


def _verdict(transcript: Transcript, states: list[State]) -> str:
    state = states[-1]
    votes = ", ".join(f"{answer}: {weight:.2f}" for answer, weight in state.votes.items()) or "none"
    stop = f"Stopped by {state.stop}" if state.stop else "Not stopped"
    return (
        f"{stop} after round {len(states) - 1}. Votes: {votes}. Answer: {state.answer}, "
        f"in the words of {state.spokesperson}:\n\n{_final_text(transcript, states)}\n"
    )
