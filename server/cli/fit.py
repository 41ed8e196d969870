"""`ensemble fit`: weights of a probability average that make development text most likely.

Every second document of each file is held back: weights are fitted to the others, and what they gain is measured on the
held-back half. Exit codes: 0 done, 1 failed, 2 called wrongly.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ensemble_server.server.cli.completion import ensemble_names
from ensemble_server.server.cli.paths import text_file

if TYPE_CHECKING:
    from ensemble_server.ensembles.comparison.paired import Comparison
    from ensemble_server.ensembles.comparison.verdict import Verdict
    from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
    from ensemble_server.server.compare.deciding.held_back import JudgedFit
    from ensemble_server.server.compare.measures.documents import Documents
    from ensemble_server.server.config.blocks import Config

T = TypeVar("T")

MARGIN_BITS_PER_BYTE = 0.01  # the smallest difference that the verdict takes for one that matters


def fit(
    config: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, callback=text_file, help="The YAML file.", metavar="CONFIG")
    ],
    name: Annotated[str, typer.Argument(help="A probability_average of it.", autocompletion=ensemble_names)],
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
            help="Development text: plain, or .jsonl with {text} in each line.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the config with the weights here, beside CONFIG.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write the weights into CONFIG itself.")] = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read in one go.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; default: window - 1, no overlap.")
    ] = None,
    document_bytes: Annotated[
        int, typer.Option(min=1, help="Least length of the documents into which plain text is cut.")
    ] = 2000,
    free: Annotated[
        bool, typer.Option("--free", help="Geometric pool: allow negative weights, which are taken as written.")
    ] = False,
    sample_mb: Annotated[
        int, typer.Option(min=1, help="Geometric pool: memory (MiB) for the sample of positions that is fitted to.")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of that sample, and of the interval.")] = 0,
    gate: Annotated[
        bool, typer.Option("--gate", help="Posterior pool: train a gate that moves its weights at each token.")
    ] = False,
) -> None:
    """Fit the weights of a probability average to development text, and say what they gain on text held back.

    Prints them; --out and --in-place also write them into a config, whose comments stay. Of a posterior pool the share
    is fitted, and with --gate a gate is trained, which is written into a file beside the config. Never fit to text that
    you will measure on.
    """
    from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
    from ensemble_server.server.compare.deciding.fitting import check_fittable
    from ensemble_server.server.compare.measures.documents import read_documents
    from ensemble_server.server.config.loading import load_config

    files = [*(text or ()), *(more or ())]
    if not files:
        raise typer.BadParameter("give at least one file of development text", param_hint="--text")
    if out is not None and in_place:
        raise typer.BadParameter("give one of --out and --in-place", param_hint="--out")
    if out is not None and out.absolute().parent != config.absolute().parent:
        raise typer.BadParameter(
            f"must be in the folder of {config}, because relative paths in it start there", param_hint="--out"
        )
    loaded = load_config(config)
    if gate:
        loaded = _without_gate(loaded, name)
    check_fittable(loaded, name)
    entry = loaded.models[name]
    assert isinstance(entry, ProbabilityAverage.Config), "nothing else can be fitted"
    if free and entry.pool != "geometric":
        raise typer.BadParameter(
            f"{name!r} is {entry.pool}; only a geometric pool takes free weights", param_hint="--free"
        )
    if gate and entry.pool != "posterior":
        raise typer.BadParameter(
            f"{name!r} is {entry.pool}; a gate moves the weights of a posterior pool", param_hint="--gate"
        )
    texts = [read_documents(path, min_bytes=document_bytes) for path in files]
    target = config if in_place else out
    if gate:
        from ensemble_server.server.cli.fit_gate import gate_lines, write_gate
        from ensemble_server.server.compare.deciding.gates import fit_and_judge_gate

        settings = {"window": window, "stride": stride, "seed": seed}
        trained = asyncio.run(_judged(fit_and_judge_gate, loaded, name, texts, settings))
        for line in gate_lines(name, trained):
            typer.echo(line)
        if target is not None and trained.fit.penalty is None:
            typer.echo(
                "a gate that learnt nothing only costs time, so nothing is written: fit the share without --gate, or "
                "give more text",
                err=True,
            )
            raise typer.Exit(1)
        if target is not None:
            typer.echo(f"wrote {write_gate(config, target, name, trained)} and {target}")
        return
    from ensemble_server.server.compare.deciding.held_back import fit_and_judge

    settings = {
        "window": window,
        "stride": stride,
        "constraint": "free" if free else "simplex",
        "sample_bytes": sample_mb * 2**20,
        "seed": seed,
    }
    judged = asyncio.run(_judged(fit_and_judge, loaded, name, texts, settings))
    for line in report_lines(name, entry, judged):
        typer.echo(line)
    if free and min(judged.fitted.weights.values()) >= 0:
        typer.echo("no weight is negative, so the pool would scale these to sum to one: fit without --free", err=True)
        raise typer.Exit(1)
    if target is not None:
        _write(config, target, name, judged)
        typer.echo(f"wrote {target}")


async def _judged(
    judge: Callable[..., Awaitable[T]], config: Config, name: str, texts: Sequence[Documents], settings: dict[str, Any]
) -> T:
    """What `judge` finds with the members of `name` loaded, and nothing else."""
    from ensemble_server.server.config.excerpt import excerpt
    from ensemble_server.server.hosting import Hosting

    async with Hosting.open(excerpt(config, [name])) as hosting:
        with _progress() as on_progress:
            return await judge(hosting, name, texts, on_progress=on_progress, **settings)


def _without_gate(config: Config, name: str) -> Config:
    """A gate is trained anew for the pool itself, whatever gate it had."""
    from ensemble_server.ensembles.probability_averaging import ProbabilityAverage

    entry = config.models.get(name)
    if not isinstance(entry, ProbabilityAverage.Config):
        return config
    return config.model_copy(update={"models": {**config.models, name: entry.model_copy(update={"gate": None})}})


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Windows that the members have read, on a terminal; a line now and then where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield (
            lambda done, total: (
                typer.echo(f"read {done} of {total} windows", err=True)
                if done in (1, total) or done % 50 == 0
                else None
            )
        )
        return
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("windows", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def report_lines(name: str, entry: ProbabilityAverage.Config, judged: JudgedFit) -> Iterator[str]:
    """The weights before and after, each member alone, and the gain with its interval and a verdict."""
    fitted = judged.fitted
    yield f"{name} ({fitted.pool}), fitted to {fitted.num_tokens} {fitted.unit}s of {judged.num_fitted} documents"
    yield ""
    width = max(len("member"), *(len(member) for member in entry.members))
    yield f"{'member':<{width}}  {'weight':>8}  {'fitted':>8}  alone, bits per byte"
    for member, weight in entry.members.items():
        alone = judged.alone[member].bits_per_byte
        yield f"{member:<{width}}  {weight:>8.4g}  {fitted.weights[member]:>8.4f}  {alone:.4f}"
    if fitted.share is not None:
        before = entry.share if isinstance(entry.share, str) else f"{entry.share:g}"
        yield f"share: {before}, fitted {fitted.share:g}"
    yield ""
    yield from held_back_lines(judged.share_seen, judged.num_held_back)
    yield f"  as configured  {judged.before.bits_per_byte:.4f}"
    yield f"  fitted         {judged.after.bits_per_byte:.4f}"
    yield f"  difference     {gain(judged.difference)}"


def held_back_lines(share_seen: float, num_held_back: int) -> Iterator[str]:
    """What stands above figures on documents held back. `share_seen`: of them, in what was fitted to."""
    from ensemble_server.server.compare.planning.held_out import MAX_SHARE, NUM_WORDS

    if share_seen > MAX_SHARE:
        yield (
            f"{share_seen:.0%} of what is held back (sequences of {NUM_WORDS} words) stands in what was fitted to, "
            "too: the gain below is no evidence of one on other text"
        )
    yield f"on {num_held_back} documents held back, bits per byte:"


def gain(compared: Comparison) -> str:
    """The difference in bits per byte, its interval, and the verdict."""
    difference = compared.difference
    interval = "too few documents for an interval"
    if difference.interval is not None:
        interval = f"95% interval {difference.interval.low:+.4f} to {difference.interval.high:+.4f}"
    return f"{difference.value:+.4f} ({interval}): {verdict_of(compared)}"


def verdict_of(compared: Comparison) -> Verdict:
    from ensemble_server.ensembles.comparison.verdict import verdict

    return verdict(
        compared.difference.interval,
        margin=MARGIN_BITS_PER_BYTE,
        higher_is_better=False,
        adjusted_p_value=compared.p_value,
        smallest_p_value=compared.smallest_p_value,
    )


def _write(config: Path, target: Path, name: str, judged: JudgedFit) -> None:
    from ensemble_server.server.config.edit import with_share, with_weights
    from ensemble_server.server.disk.whole_file import write_whole

    source = config.read_bytes().decode("utf-8")  # not read_text, which would change line ends
    fitted = judged.fitted
    if fitted.share is not None:
        write_whole(target, with_share(source, name, fitted.share).encode())
    else:
        write_whole(target, with_weights(source, name, fitted.weights).encode())
