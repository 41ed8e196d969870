"""`ensemble vote`: who wins over answers that are there already, in files.

Exit codes: 0 all rows voted, 1 failed, 2 called wrongly, 3 some rows could not be voted on (their output rows say why).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from ensemble_server.server.cli.completion import model_names
from ensemble_server.server.cli.paths import readable

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import DistributionModel
    from ensemble_server.ensembles.label_probabilities import LabelPool
    from ensemble_server.ensembles.voting.answer_extraction import AnswerKind
    from ensemble_server.server.batch.votes.rows import Row

SOME_ROWS_FAILED = 3


def answer_files(value: list[Path] | None) -> list[Path] | None:
    for path in value or ():
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder, and no file")
    return readable(value)


def vote(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CANDIDATES | SYSTEM...]",
            callback=answer_files,
            help='JSONL of {"id", "candidates": \\[text or {"text", "weight", "system"}]}, or the output of a batch; - '
            "reads standard input. With --systems: one file per system, a text per line or JSONL of texts or of {id, "
            "text}. With --classes: outputs of classify jobs.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL; default: standard output.")] = None,
    similarity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=WEIGHT],...",
            help="What makes two answers alike: embedding, rouge_l_word, ... Default: rouge_l_word; with --scores the "
            "only one that they have.",
        ),
    ] = None,
    systems: Annotated[bool, typer.Option("--systems", help="The files hold one system's answers each.")] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            callback=readable,
            help="Replay these pairwise scores: an output of --explain, or a .csv/.tsv with the columns id, candidate, "
            "reference and one for each similarity. With files of answers, those are matched by id.",
        ),
    ] = None,
    answer: Annotated[
        Literal["number", "choice", "yes_no", "text"] | None,
        typer.Option(help="Count the answers found in the texts instead of comparing texts: the majority wins."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="SYSTEM=WEIGHT,... | FILE", help="Weights by system or model; FILE: JSON of a map."),
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="GOLD",
            exists=True,
            dir_okay=False,
            callback=readable,
            help='With --answer: fit weights of the systems to JSONL of {"id", "answer"}, by cross-validation: no row '
            "is voted on with weights that its own answer was used for.",
        ),
    ] = None,
    save_weights: Annotated[
        Path | None, typer.Option(dir_okay=False, help="With --fit: write the weights here, for --weights.")
    ] = None,
    by_probability: Annotated[
        bool,
        typer.Option("--by-probability", help="A vote weighs as much as its text is likely per token (logprobs)."),
    ] = False,
    likeliest: Annotated[
        bool,
        typer.Option("--likeliest", help="Take the text that its writer found likeliest per token (logprobs)."),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A model of --config compares the candidates in pairs.", autocompletion=model_names
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", exists=True, dir_okay=False, help="Where the judge is.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="With --judge: which answer is ...?")] = None,
    classes: Annotated[
        Literal["arithmetic", "geometric", "ranks"] | None,
        typer.Option(help="Average the class probabilities of separate classify jobs."),
    ] = None,
    prune: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out answers below this share of the median score.")
    ] = None,
    embedding: Annotated[
        str, typer.Option(metavar="MODEL", help="Embedding model: a packaged name or a folder.")
    ] = "all-MiniLM-L6-v2",
    explain: Annotated[bool, typer.Option(help="Write candidates, ranking and matrices too.")] = False,
) -> None:
    """Elect, in each row, the answer that is most like all the others.

    Writes {"id", "winner", "text", "system", "scores", "margin", "ties"} for each row, or {"id", "line", "error"}.
    With --answer: {"id", "winner", "text", "system", "answer", "votes", "agreement"}; the text is the first with the
    answer that was given most often, or the first of all if none has one.
    With --judge the scores are the sums of its preferences, with --likeliest nats per token. With --classes: {"id",
    "label", "probabilities", "jobs"}.
    """
    files = files or []
    _check_call(
        files=files,
        systems=systems,
        answer=answer,
        scores=scores,
        likeliest=likeliest,
        judge=judge,
        classes=classes,
        fit=fit,
        others={
            "--similarity": similarity is not None,
            "--prune": prune is not None,
            "--explain": explain,
            "--weights": weights is not None,
            "--by-probability": by_probability,
            "--config": config is not None,
            "--criterion": criterion is not None,
            "--save-weights": save_weights is not None,
        },
    )
    for path in (*files, scores, fit):
        if output is not None and path is not None and path.exists() and output.exists() and output.samefile(path):
            raise typer.BadParameter("would overwrite its own input", param_hint="--output")
    blend = None if similarity is None else _parsed_blend(similarity, are_known=scores is None)

    with ExitStack() as stack:
        if classes is not None:
            reports = _classes(files, classes, weights)
        else:
            rows = _rows(files, systems, scores, stack)
            if weights is not None or fit is not None or by_probability:
                rows = _weighed(list(rows), weights, fit, answer, save_weights, by_probability)
            if judge is not None:
                assert config is not None, "was checked"
                reports = _judged(rows, config, judge, criterion, explain)
            elif likeliest:
                from ensemble_server.server.batch.votes.reports import take_likeliest

                reports = take_likeliest(rows)
            else:
                reports = _voted(rows, blend, answer, prune, explain, embedding if scores is None else None)
        sink = sys.stdout.buffer if output is None else stack.enter_context(output.open("wb"))
        num_rows, num_failed = asyncio.run(_write(reports, sink))
    typer.echo(f"{num_rows - num_failed} rows voted, {num_failed} failed", err=True)
    if num_failed:
        raise typer.Exit(SOME_ROWS_FAILED)


# What an option of one way to choose is refused with: "--answer" and the like choose without it.
_WAYS = {
    "--answer": "counts answers",
    "--likeliest": "compares likelihoods",
    "--judge": "asks a judge",
    "--classes": "averages probabilities",
}
_TAKES = {
    None: {"--similarity", "--prune", "--explain", "--weights", "--by-probability"},
    "--answer": {"--weights", "--by-probability", "--save-weights"},
    "--likeliest": set(),
    "--judge": {"--explain", "--config", "--criterion"},
    "--classes": {"--weights"},
}


def _check_call(
    *,
    files: Sequence[Path],
    systems: bool,
    answer: str | None,
    scores: Path | None,
    likeliest: bool,
    judge: str | None,
    classes: str | None,
    fit: Path | None,
    others: Mapping[str, bool],
) -> None:
    """Raise `typer.BadParameter` for options that do not go together."""
    ways = {"--answer": answer, "--likeliest": likeliest, "--judge": judge, "--classes": classes}
    chosen = [name for name, is_given in ways.items() if is_given]
    if len(chosen) > 1:
        raise typer.BadParameter(
            f"{chosen[0]} and {chosen[1]} choose in different ways; give one", param_hint=chosen[1]
        )
    way = chosen[0] if chosen else None
    if not files and (scores is None or way is not None):
        raise typer.BadParameter("give either files of answers or --scores, or both", param_hint="FILES")
    if way is not None and scores is not None:
        raise typer.BadParameter(f"{_WAYS[way]}; there are no scores to replay", param_hint=way)
    refused = [name for name, is_given in others.items() if is_given and name not in _TAKES[way]]
    if refused:
        what = _WAYS[way] if way is not None else "compares texts"
        raise typer.BadParameter(f"{what}, which takes no {refused[0]}", param_hint=way or refused[0])
    if fit is not None and (way != "--answer" or others["--weights"]):
        raise typer.BadParameter("goes with --answer, and not with --weights", param_hint="--fit")
    if others["--save-weights"] and fit is None:
        raise typer.BadParameter("goes with --fit", param_hint="--save-weights")
    if judge is not None and not others["--config"]:
        raise typer.BadParameter(f"needs --config, the file in which {judge!r} is", param_hint="--judge")
    if len(files) > 1 and not systems and classes is None:
        raise typer.BadParameter("several files are one per system: add --systems", param_hint="FILES")
    if systems and not files:
        raise typer.BadParameter("needs the systems' files", param_hint="--systems")


def _parsed_blend(text: str, *, are_known: bool) -> Mapping[str, float]:
    """ "rouge_l_word=1,embedding" -> {"rouge_l_word": 1.0, "embedding": 1.0}; `are_known`: only names that we have."""
    from pydantic import TypeAdapter, ValidationError

    from ensemble_server.ensembles.voting.similarity import SimilarityBlend

    blend = {}
    for part in text.split(","):
        name, has_weight, weight = part.strip().partition("=")
        try:
            blend[name.strip()] = float(weight) if has_weight else 1.0
        except ValueError:
            raise typer.BadParameter(f"{name}: {weight!r} is no number", param_hint="--similarity") from None
    if not are_known:
        return blend
    try:
        TypeAdapter(SimilarityBlend).validate_python(blend)
    except ValidationError as exc:
        finding = exc.errors(include_url=False)[0]
        raise typer.BadParameter(f"{finding['loc'][0]}: {finding['msg']}", param_hint="--similarity") from exc
    return blend


def _rows(files: Sequence[Path], systems: bool, scores: Path | None, stack: ExitStack) -> Iterable[Row]:
    from ensemble_server.server.batch.votes.candidates import read_candidates, read_systems
    from ensemble_server.server.batch.votes.scores import joined, read_scores

    if not files:
        assert scores is not None, "was checked"
        return read_scores(scores)
    if systems:
        rows: Iterable[Row] = read_systems(files)
    elif str(files[0]) == "-":
        rows = read_candidates(sys.stdin.buffer, "standard input")
    else:
        rows = read_candidates(stack.enter_context(files[0].open("rb")), str(files[0]))
    return rows if scores is None else joined(rows, read_scores(scores), scores)


def _weighed(
    rows: list[Row],
    weights: str | None,
    gold: Path | None,
    kind: AnswerKind | None,
    save_to: Path | None,
    by_probability: bool,
) -> list[Row]:
    from ensemble_server.server.batch.votes import weighing

    if by_probability:
        rows = [weighing.by_probability(row) for row in rows]
    if weights is not None:
        return weighing.by_system(rows, weighing.read_weights(weights))
    if gold is None:
        return rows
    assert kind is not None, "was checked"
    fitted = weighing.fitted(rows, weighing.read_gold(gold, kind), kind)
    worth = fitted.worth
    typer.echo(
        f"{fitted.num_known} rows with a known answer, weights fitted to four fifths of them and held to the others: "
        f"{worth.fitted:.3f} right; all systems alike: {worth.alike:.3f}; the best system by itself: {worth.best:.3f}",
        err=True,
    )
    shown = ", ".join(f"{system}={weight:.3g}" for system, weight in fitted.weights.items())
    typer.echo(f"weights fitted to all of them: {shown}", err=True)
    if save_to is not None:
        save_to.write_text(json.dumps(fitted.weights, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return fitted.rows


def _voted(
    rows: Iterable[Row],
    blend: Mapping[str, float] | None,
    answer: AnswerKind | None,
    prune: float | None,
    explain: bool,
    embedding: str | None,
) -> AsyncIterator[dict[str, Any]]:
    from ensemble_server.server.batch.votes.reports import count_answers, vote_on_rows

    if answer is not None:
        return count_answers(rows, answer)
    embedder = None
    if blend is not None and "embedding" in blend and embedding is not None:
        from ensemble_server.server.weights.embeddings import SentenceEmbedder

        embedder = SentenceEmbedder(embedding)
    return vote_on_rows(rows, blend, embedder=embedder, prune=prune, explain=explain)


async def _judged(
    rows: Iterable[Row], config: Path, name: str, criterion: str | None, explain: bool
) -> AsyncIterator[dict[str, Any]]:
    from ensemble_server.ensembles.voting.pairwise import CRITERION
    from ensemble_server.server.batch.votes.reports import judge_rows

    async with AsyncExitStack() as stack:
        judge = await _loaded(config, name, stack)
        async for report in judge_rows(rows, judge, criterion=criterion or CRITERION, explain=explain):
            yield report


async def _loaded(path: Path, name: str, stack: AsyncExitStack) -> DistributionModel:
    """The judge, loaded with what it needs. Raises `ConfigError` if it gives no next-token distributions."""
    from ensemble_server.ensembles.base import DistributionModel
    from ensemble_server.ensembles.errors import ConfigError
    from ensemble_server.server.config.excerpt import excerpt
    from ensemble_server.server.config.loading import load_config
    from ensemble_server.server.config.problems import nearest

    config = load_config(path)
    if name not in config.models:
        raise ConfigError(f"{path}: there is no model {name!r}{nearest(name, list(config.models))}")
    typer.echo(f"Loading {name} ...", err=True)
    from ensemble_server.server.hosting import Hosting  # loads torch

    hosting = await stack.enter_async_context(Hosting.open(excerpt(config, [name])))
    judge = hosting.models[name]
    if not isinstance(judge, DistributionModel):
        raise ConfigError(
            f"{path}: the judge {name!r} gives text, not next-token distributions; take a hosted model or a "
            "probability_average"
        )
    return judge


async def _classes(files: Sequence[Path], pool: LabelPool, weights: str | None) -> AsyncIterator[dict[str, Any]]:
    from ensemble_server.server.batch.votes.classifications import pooled_rows, read_classifications
    from ensemble_server.server.batch.votes.reports import report_of_bad
    from ensemble_server.server.batch.votes.rows import BadRow
    from ensemble_server.server.batch.votes.weighing import read_weights

    rows = read_classifications(files)
    for report in pooled_rows(rows, pool, {} if weights is None else read_weights(weights)):
        yield report_of_bad(report) if isinstance(report, BadRow) else report


async def _write(reports: AsyncIterator[Mapping[str, Any]], sink: BinaryIO) -> tuple[int, int]:
    """Write every report as a line. Returns how many there were and how many of them are errors."""
    import orjson
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    num_rows = num_failed = 0
    columns = (SpinnerColumn(), TextColumn("rows"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("rows", total=None)
        async for report in reports:
            sink.write(orjson.dumps(report) + b"\n")
            num_rows += 1
            num_failed += "error" in report
            progress.advance(task)
        sink.flush()
    return num_rows, num_failed
