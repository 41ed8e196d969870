"""`ensemble compare`: several models on the same work, with error bars.

Exit codes: 0 every arm was measured, 1 failed, 2 called wrongly, 3 some arms failed (their rows say why), 130 was
interrupted: the same command goes on where it was.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble_server.server.cli.paths import check_text, text_file

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ensemble_server.server.compare.kept.results import ArmResult, Difference, Results
    from ensemble_server.server.compare.listener import Listener
    from ensemble_server.server.compare.planning.plan import Plan
    from ensemble_server.server.config.blocks import Config
    from ensemble_server.server.config.distillation import Distillation

SOME_ARMS_FAILED = 3
INTERRUPTED = 130
SECONDS_BETWEEN_LINES = 10


def compare(
    plan: Annotated[
        Path | None,
        typer.Argument(
            dir_okay=False,
            metavar="[PLAN]",
            help="YAML: the arms and what is measured. With --init: where to write it.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", file_okay=False, help="Folder for results and reports; may hold earlier ones."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write results and report again from what is measured; run no model.")
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", dir_okay=False, metavar="FILE", help="Also write every item of every arm as CSV."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print arms, items, tokens, hours and money; start and write nothing.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            exists=True,
            dir_okay=False,
            callback=text_file,
            metavar="CONFIG",
            help="Write a plan for this config, to be filled in; by default compare.yaml beside it.",
        ),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", exists=True, metavar="A B", help="What changed between two results: files or folders."),
    ] = None,
) -> None:
    """Compare models, ensembles and weight merges on the same texts and tasks.

    Writes results.json, report.md, report.html and items.html. What was measured before stays as long as nothing that
    it depends on has changed; so a comparison that was stopped goes on with the same command.
    """
    if diff is not None:
        from ensemble_server.server.cli.compare_diff import print_difference

        print_difference(*diff)
        return
    if init is not None:
        from ensemble_server.server.cli.compare_init import init_plan

        init_plan(init, plan or init.parent / "compare.yaml")
        return
    if plan is not None:
        check_text(plan, "PLAN")
    if plan is None or not plan.exists():
        what = "give a plan" if plan is None else f"there is no file {plan}"
        raise typer.BadParameter(f"{what}; `ensemble compare --init CONFIG` writes one", param_hint="PLAN")
    if out is None and not dry_run:
        raise typer.BadParameter("give the folder for results", param_hint="--out")
    from ensemble_server.server.compare.planning.plan import load_plan

    loaded = load_plan(plan)
    if dry_run:
        from ensemble_server.server.cli.compare_dry_run import dry_run as say_what_it_takes

        say_what_it_takes(loaded)
        return
    assert out is not None, "checked above"
    _run(loaded, out, report_only=report_only, csv=csv)


def _run(plan: Plan, out: Path, *, report_only: bool, csv: Path | None) -> None:
    from ensemble_server.server.compare.run import read_items, report_again, run_comparison

    try:
        if report_only:
            results = report_again(plan, out)
        else:
            with _listener() as listener:
                compared = run_comparison(plan, out, listener, command=_command(), distiller=_distilled)
                results = asyncio.run(compared)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was measured is kept in {out}, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(_summary(results))
    typer.echo(f"{out / 'report.html'}, items.html, report.md and results.json tell the rest")
    if csv is not None:
        from ensemble_server.server.compare.report.items_csv import write_csv

        typer.echo(f"{csv}: {write_csv(read_items(plan, out), csv)} lines, one for each item and arm")
    failed = {name: arm.error for name, arm in results.arms.items() if arm.error is not None}
    for name, error in failed.items():
        typer.echo(f"{name}: {error}", err=True)
    if failed:
        raise typer.Exit(SOME_ARMS_FAILED)


def _distilled(config: Config, wanted: Distillation, say: Callable[[str], None]) -> Mapping[str, Any]:
    """Imports what training takes where it is wanted, in the thread that it runs in: an event loop that imports for
    seconds hears no Ctrl-C."""
    from ensemble_server.server.distill.arm import distilled_entry

    return distilled_entry(config, wanted, say)


def _command() -> str:
    return shlex.join(["ensemble", *sys.argv[1:]])


@contextmanager
def _listener() -> Iterator[Listener]:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("starting", total=None)

    def stage(self, text: str) -> None:
        from rich.markup import escape

        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(text), total=None)

    def progress(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


class _Lines:
    def __init__(self) -> None:
        self._last = 0.0

    def stage(self, text: str) -> None:
        typer.echo(text, err=True)

    def progress(self, done: int, total: int) -> None:
        from time import monotonic

        if monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = monotonic()
            typer.echo(f"  {done}/{total}", err=True)


def _summary(results: Results) -> str:
    """The best of each kind, then a line per arm: its figures and the verdicts on them; one mean for several texts."""
    from ensemble_server.server.compare.report.headline import headline

    width = max(len(name) for name in results.arms)
    return "\n".join([*headline(results), *(f"{name:<{width}}  {_figures(arm)}" for name, arm in results.arms.items())])


def _figures(arm: ArmResult) -> str:
    parts = [] if arm.error is None else ["failed"]
    if arm.mean_text is not None:
        parts.append(f"mean {arm.mean_text.value:.4f} bpb{_verdict(arm.mean_text.against_baseline)}")
    else:
        parts += [f"{name} {text.bpb:.4f} bpb{_verdict(text.against_baseline)}" for name, text in arm.text.items()]
    parts += [
        f"{name} {task.score:.3f} {task.metric}{_verdict(task.against_baseline)}" for name, task in arm.tasks.items()
    ]
    return ", ".join(parts) or "nothing measured"


def _verdict(difference: Difference | None) -> str:
    return "" if difference is None else f" ({difference.verdict})"
