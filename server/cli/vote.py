"""`ensemble vote`: the crowd vote, or the majority, over answers that are there already, in files.

Exit codes: 0 all rows voted, 1 failed, 2 called wrongly, 3 some rows could not be voted on (their output rows say why).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

if TYPE_CHECKING:
    import numpy as np

    from ensemble_server.ensembles.base import Embedder
    from ensemble_server.ensembles.voting.answer_extraction import AnswerKind
    from ensemble_server.server.batch.vote_files import CandidateRow, Row

NUM_ROWS_AT_ONCE = 64  # rows whose texts are embedded together
SOME_ROWS_FAILED = 3


def vote(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CANDIDATES | SYSTEM...]",
            help='JSONL of {"id", "candidates": \\[text or {"text", "weight", "system"}]}; - reads standard input. '
            "With --systems: one file per system, a text per line or JSONL of texts or of {id, text}.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL; default: standard output.")] = None,
    similarity: Annotated[
        str,
        typer.Option(metavar="NAME[=WEIGHT],...", help="What makes two answers alike: embedding, rouge_l_word, ..."),
    ] = "rouge_l_word",
    systems: Annotated[bool, typer.Option("--systems", help="The files hold one system's answers each.")] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Replay these pairwise scores: an output of --explain, or a .csv/.tsv with the columns id, candidate, "
            "reference and one for each similarity.",
        ),
    ] = None,
    answer: Annotated[
        Literal["number", "choice", "yes_no", "text"] | None,
        typer.Option(help="Count the answers found in the texts instead of comparing texts: the majority wins."),
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
    """
    from pydantic import TypeAdapter, ValidationError

    from ensemble_server.ensembles.voting.similarity import SimilarityBlend
    from ensemble_server.server.batch.vote_files import read_candidates, read_scores, read_systems

    files = files or []
    if bool(files) == (scores is not None):
        raise typer.BadParameter("give either files of answers or --scores", param_hint="FILES")
    if answer is not None and (scores is not None or explain or prune is not None):
        raise typer.BadParameter(
            "counts answers; there are no scores to replay, prune or explain", param_hint="--answer"
        )
    if len(files) > 1 and not systems:
        raise typer.BadParameter("several files are one per system: add --systems", param_hint="FILES")
    if output is not None and any(path.exists() and output.exists() and output.samefile(path) for path in files):
        raise typer.BadParameter("would overwrite its own input", param_hint="--output")
    blend = _parsed_blend(similarity)
    if scores is None:
        try:
            blend = TypeAdapter(SimilarityBlend).validate_python(blend)
        except ValidationError as exc:
            finding = exc.errors(include_url=False)[0]
            raise typer.BadParameter(f"{finding['loc'][0]}: {finding['msg']}", param_hint="--similarity") from exc

    with ExitStack() as stack:
        rows: Iterable[Row]
        if scores is not None:
            rows = read_scores(scores)
        elif systems:
            rows = read_systems(files)
        else:
            source = sys.stdin.buffer if str(files[0]) == "-" else stack.enter_context(files[0].open("rb"))
            rows = read_candidates(source)
        sink = sys.stdout.buffer if output is None else stack.enter_context(output.open("wb"))
        embedder = None
        if "embedding" in blend and scores is None and answer is None:
            from ensemble_server.server.weights.embeddings import SentenceEmbedder

            embedder = SentenceEmbedder(embedding)
            stack.callback(embedder.close)
        if answer is None:
            reports = vote_on_rows(rows, blend, embedder=embedder, prune=prune, explain=explain)
        else:
            reports = count_answers(rows, answer)
        num_rows, num_failed = asyncio.run(_write(reports, sink))
    typer.echo(f"{num_rows - num_failed} rows voted, {num_failed} failed", err=True)
    if num_failed:
        raise typer.Exit(SOME_ROWS_FAILED)


def _parsed_blend(text: str) -> dict[str, float]:
    """ "rouge_l_word=1,embedding" -> {"rouge_l_word": 1.0, "embedding": 1.0}"""
    blend = {}
    for part in text.split(","):
        name, has_weight, weight = part.strip().partition("=")
        try:
            blend[name.strip()] = float(weight) if has_weight else 1.0
        except ValueError:
            raise typer.BadParameter(f"{name}: {weight!r} is no number", param_hint="--similarity") from None
    return blend


async def _write(reports: AsyncIterator[Mapping[str, Any]], sink: BinaryIO) -> tuple[int, int]:
    """Write every report as a line. Returns how many there were and how many of them are errors."""
    import orjson
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    num_rows = num_failed = 0
    columns = (SpinnerColumn(), TextColumn("rows"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("rows", total=None)
        async for report in reports:
            sink.write(orjson.dumps(report) + b"\n")
            num_rows += 1
            num_failed += "error" in report
            progress.advance(task)
        sink.flush()
    return num_rows, num_failed


# --- voting ------------------------------------------------------------------------------------------------------


async def vote_on_rows(
    rows: Iterable[Row],
    similarity: Mapping[str, float],
    *,
    embedder: Embedder | None = None,
    prune: float | None = None,
    explain: bool = False,
) -> AsyncIterator[dict[str, Any]]:
    """The report of each row's vote, in the rows' order; of a bad row, what is wrong with it.

    `explain` adds the ranking, the matrices and the candidates, so that `read_scores` can replay the vote. Each
    distinct text of NUM_ROWS_AT_ONCE rows is embedded once.
    """
    from ensemble_server.server.batch.vote_files import BadRow

    for chunk in _chunks(rows):
        known = await _Embedded.of(chunk, embedder) if embedder is not None else None
        for row in chunk:
            if isinstance(row, BadRow):
                yield {"id": row.id, "line": row.line, "error": row.error}
            else:
                yield await _vote(row, similarity, known, prune, explain)


async def count_answers(rows: Iterable[Row], kind: AnswerKind) -> AsyncIterator[dict[str, Any]]:
    """The report of each row's majority, in the rows' order; of a bad row, what is wrong with it."""
    from ensemble_server.ensembles.voting.answer_extraction import extract
    from ensemble_server.ensembles.voting.majority import agreement, plurality, tally
    from ensemble_server.server.batch.vote_files import BadRow

    for row in rows:
        if isinstance(row, BadRow):
            yield {"id": row.id, "line": row.line, "error": row.error}
            continue
        assert row.texts is not None, "only scores to replay come without texts"
        votes = [extract(text, kind) for text in row.texts]
        answer = plurality(votes, row.weights)
        winner = votes.index(answer) if answer is not None else 0
        report: dict[str, Any] = {"id": row.id, "winner": winner, "text": row.texts[winner]}
        if row.systems[winner] is not None:
            report["system"] = row.systems[winner]
        sums = tally(votes, row.weights)
        yield report | {"answer": answer, "votes": sums, "agreement": agreement(sums)}


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, NUM_ROWS_AT_ONCE)):
        yield chunk


class _Embedded:
    """Vectors that were made beforehand: an `Embedder` that looks them up."""

    def __init__(self, name: str, vectors: Mapping[str, np.ndarray]) -> None:
        self.name = name
        self._vectors = vectors

    @classmethod
    async def of(cls, rows: Sequence[Row], embedder: Embedder) -> _Embedded:
        from ensemble_server.ensembles.thoughts import without_thoughts
        from ensemble_server.server.batch.vote_files import BadRow

        texts = list(
            dict.fromkeys(
                without_thoughts(text) for row in rows if not isinstance(row, BadRow) for text in row.texts or ()
            )
        )
        return cls(embedder.name, dict(zip(texts, await embedder.embed(texts), strict=True)))

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        import numpy as np

        return np.stack([self._vectors[text] for text in texts])


async def _vote(
    row: CandidateRow, similarity: Mapping[str, float], embedder: Embedder | None, prune: float | None, explain: bool
) -> dict[str, Any]:
    from ensemble_server.ensembles.crowd_vote import count, hold_vote

    texts = row.texts or tuple(f"candidate {index}" for index in range(len(row.weights)))
    if not row.matrices:
        held = await hold_vote(texts, similarity, embedder=embedder, weights=row.weights, prune=prune)
    elif missing := sorted(set(similarity) - set(row.matrices)):
        known = ", ".join(row.matrices)
        return {"id": row.id, "error": f"there are no scores of {missing[0]!r} to replay (there are: {known})"}
    else:
        held = count(texts, row.matrices, similarity, weights=row.weights, prune=prune)
    full = held.report()
    winner = held.consensus.winner
    report = {"id": row.id, "winner": winner, "text": row.texts[winner] if row.texts else None}
    if row.systems[winner] is not None:
        report["system"] = row.systems[winner]
    report |= {key: full[key] for key in ("scores", "margin", "ties")}
    if explain:
        report |= {key: value for key, value in full.items() if key not in report}
    if explain and row.texts:
        report["candidates"] = [
            {"text": text, "weight": weight, "system": system}
            for text, weight, system in zip(row.texts, row.weights, row.systems, strict=True)
        ]
    return report
