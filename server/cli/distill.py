"""`ensemble distill`: one model is taught what an ensemble says of texts, or answers to prompts.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 was interrupted: the same command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ensemble_server.server.cli.completion import ensemble_names, model_names
from ensemble_server.server.cli.paths import text_file

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ensemble_server.server.config.distillation import Distillation
    from ensemble_server.server.distill.card import Card
    from ensemble_server.server.distill.listener import Listener

INTERRUPTED = 130
SECONDS_BETWEEN_LINES = 10


def distill(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, callback=text_file, help="The YAML file.", metavar="CONFIG")
    ],
    ensemble: Annotated[
        str,
        typer.Argument(
            help="The teacher: a probability_average of it; with --chat alone, any model.",
            metavar="ENSEMBLE",
            autocompletion=ensemble_names,
        ),
    ],
    student: Annotated[
        str, typer.Option(metavar="NAME", help="Which hosted model of it learns.", autocompletion=model_names)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the student; must not exist, or be empty.", metavar="DIR")
    ],
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            exists=True, dir_okay=False, callback=text_file, metavar="[TEXT]...", help="More files, as in --text A B C."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            callback=text_file,
            help="What both read: plain, or .jsonl with {text} in each line.",
        ),
    ] = None,
    chat: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            callback=text_file,
            metavar="PROMPTS.jsonl",
            help="Prompts, {messages} or {prompt} in each line; what the ensemble answers is taught. "
            "May be given several times, and beside --text.",
        ),
    ] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="--chat: longest answer; default 256.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="--chat: of the answers; default 0 of averages, of others as always."),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            callback=text_file,
            help="A text to be measured on: refused if it is trained on.",
        ),
    ] = None,
    target: Annotated[
        Literal["mixture", "min_ce", "avg_ce"] | None,
        typer.Option(
            help="mixture (default): the ensemble as it serves; min_ce: its best member; avg_ce: members by exp(-CE)."
        ),
    ] = None,
    level: Annotated[
        Literal["token", "window", "document"] | None,
        typer.Option(help="min_ce, avg_ce: over what cross entropies are taken; default window."),
    ] = None,
    align: Annotated[
        Literal["exact", "mined", "em"] | None,
        typer.Option(
            help="Members of other vocabularies: exact (default; their ways to spell the text are summed out), mined "
            "(FuseLLM: tokens to the nearest by edit distance), em (to equal tokens alone)."
        ),
    ] = None,
    clm: Annotated[
        float | None, typer.Option(min=0, max=1, help="Part of the loss that is the text itself; default 0.5.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="zero|merge|MEMBER|RECIPE.yml|./FOLDER",
            help="Start as the student is (default), as the linear merge of the members, as one of them, or as another "
            "merge: mergekit's recipe, or the folder of a model (with a slash in it).",
            autocompletion=model_names,
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the LoRA adapter that is trained; default 12.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of an adapter.")] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Likeliest tokens of each member that are kept; default 64.")
    ] = None,
    no_tail: Annotated[
        bool, typer.Option("--no-tail", help="Cut the rest of the vocabulary off; it is kept as one bucket otherwise.")
    ] = False,
    window: Annotated[int | None, typer.Option(min=8, help="Tokens that are read in one go; default 256.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows of one step; default 4.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How often the texts are read, if time allows.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Exactly so many steps, whatever the time.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Longest training; the schedule ends then. Default 20.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest; default 0.001, with --full 0.00002.", show_default=False)
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Last part of each text that is not trained on; default 0.05.")
    ] = None,
    records_mb: Annotated[
        int, typer.Option(min=1, help="Most room (MiB) on disk for what the members say of the texts.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter's start and the order of the text.")] = 0,
) -> None:
    """Teach one model what an ensemble says of texts, or answers to prompts: its quality, as far as one model takes it,
    at one model's price.

    The student, a LoRA adapter or a model folder with a card, can be a model of the config. What the members say is
    kept in the cache ($ENSEMBLE_CACHE) for other targets. Never teach with text that you will measure on.
    """
    files = [*(text or ()), *(more or ())]
    if not files and not chat:
        raise typer.BadParameter("give at least one file to learn from", param_hint="--text or --chat")
    given: dict[str, Any] = {
        "target": target,
        "level": level,
        "align": align,
        "clm": clm,
        "init": init,
        "rank": rank,
        "top_k": top_k,
        "window": window,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "minutes": minutes,
        "learning_rate": learning_rate,
        "held_out": held_out,
        "answer_tokens": answer_tokens,
        "temperature": temperature,
    }
    wanted = _checked(
        {name: value for name, value in given.items() if value is not None}
        | {
            "ensemble": ensemble,
            "student": student,
            "text": [str(file) for file in files],
            "chat": [str(file) for file in chat or ()],
            "full": full,
            "tail": not no_tail,
            "seed": seed,
        }
    )
    from ensemble_server.server.config.loading import load_config
    from ensemble_server.server.distill.run import distill as run

    loaded = load_config(config)
    try:
        with _listener() as listener:
            card = run(loaded, wanted, out, listener, tests=test or (), records_bytes=records_mb * 2**20)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for line in report_lines(card, out):
        typer.echo(line)


def _checked(settings: dict[str, Any]) -> Distillation:
    from pydantic import ValidationError

    from ensemble_server.server.config.distillation import Distillation

    try:
        return Distillation.model_validate(settings, context={"folder": Path.cwd()})
    except ValidationError as exc:
        raise typer.BadParameter("; ".join(_told(error["loc"], error["msg"]) for error in exc.errors())) from None


def _told(place: tuple[int | str, ...], message: str) -> str:
    options = [f"--{key.replace('_', '-')}" for key in place if isinstance(key, str)]
    return " ".join([*options, message.removeprefix("Value error, ")])


def report_lines(card: Card, out: Path) -> Iterator[str]:
    """What the student reached on what was held out, and how to serve it."""
    yield f"{out}: {card.student} after {card.steps} steps in {card.minutes:.1f} minutes"
    how = "with its distributions" if card.has_targets else "as plain text"
    for file, answers in card.answers.items():
        left = f", {answers.unanswered} prompts had no answer" if answers.unanswered else ""
        yield f"{file}: {answers.taught} answers of {card.ensemble} taught {how}, {answers.held_out} held out{left}"
    yield ""
    yield "on the held-out end of the files:    bits per byte   KL to the ensemble"
    for name, figures in (("before", card.before), ("after", card.after)):
        yield f"  {name:<34} {figures.bits_per_byte:>13.4f}   {'' if figures.kl is None else f'{figures.kl:.4f}':>18}"
    if card.ensemble_bits_per_byte is not None:
        yield f"  {f'the ensemble, {card.ensemble}':<34} {card.ensemble_bits_per_byte:>13.4f}"
    if card.share_seen > 0.1:
        yield f"{card.share_seen:.0%} of what is held out stands in what was trained on, too: no evidence of other text"
    name = out.name.replace(" ", "-")
    entries: dict[str, str] = {}
    if card.start_folder is not None:
        start = f"{name}-start"
        entries[start] = f"path: {out.absolute() / card.start_folder}"
        entries[name] = f"base: {start}, adapter: {out.absolute()}"
    elif card.is_adapter:
        entries[name] = f"base: {card.base}, adapter: {out.absolute()}"
    else:
        entries[name] = f"path: {out.absolute()}"
    yield f"In the config: models: {{{', '.join(f'{name}: {{{entry}}}' for name, entry in entries.items())}}}"


@contextmanager
def _listener() -> Iterator[Listener]:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


def _said(clm: float, kl: float | None) -> str:
    return f"text {clm:.3f}" + ("" if kl is None else f", teacher {kl:.3f}") + " nats per token"


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage = "starting"
        self._task: TaskID = progress.add_task(self._stage, total=None)

    def stage(self, text: str) -> None:
        from rich.markup import escape

        self._stage = escape(text)
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(self._stage, total=None)

    def progress(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def losses(self, clm: float, kl: float | None) -> None:
        self._progress.update(self._task, description=f"{self._stage}: {_said(clm, kl)}")


class _Lines:
    def __init__(self) -> None:
        self._last = 0.0
        self._losses = ""

    def stage(self, text: str) -> None:
        self._losses = ""
        typer.echo(text, err=True)

    def progress(self, done: int, total: int) -> None:
        from time import monotonic

        if monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = monotonic()
            typer.echo(f"  {done}/{total}{self._losses}", err=True)

    def losses(self, clm: float, kl: float | None) -> None:
        self._losses = f": {_said(clm, kl)}"
