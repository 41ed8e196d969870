"""The report of each row's vote, in the rows' order, JSON-ready; of a row that cannot be voted on, what is wrong.

Five ways to choose: by similarity, by counting the answers in the texts, by how likely their writers found them, by a
judge, and by scores that are there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ensemble_server.ensembles.base import Embedder, GenerationRequest, Model
from ensemble_server.ensembles.crowd_vote import count, hold_vote
from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.ensembles.ranking import compare_by_judge
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.consensus import Consensus, ranked
from ensemble_server.ensembles.voting.majority import agreement, plurality, tally
from ensemble_server.server.batch.votes.rows import BadRow, CandidateRow, Row
from ensemble_server.server.batch.votes.weighing import nats_per_token

NUM_ROWS_AT_ONCE = 64  # rows whose texts are embedded together
DEFAULT_SIMILARITY = "rouge_l_word"

Report = dict[str, Any]


def report_of_bad(row: BadRow) -> Report:
    return {"id": row.id, "line": row.line, "error": row.error}


async def vote_on_rows(
    rows: Iterable[Row],
    similarity: Mapping[str, float] | None,
    *,
    embedder: Embedder | None = None,
    prune: float | None = None,
    explain: bool = False,
) -> AsyncIterator[Report]:
    """The crowd vote on each row. `similarity`: None takes the only one that a row has scores of, else the default.

    `explain` adds the ranking, the matrices and the candidates, so that the vote can be replayed. Each distinct text of
    NUM_ROWS_AT_ONCE rows is embedded once.
    """
    for chunk in _chunks(rows):
        known = await _Embedded.of(chunk, embedder) if embedder is not None else None
        for row in chunk:
            yield report_of_bad(row) if isinstance(row, BadRow) else await _vote(row, similarity, known, prune, explain)


async def count_answers(rows: Iterable[Row], kind: AnswerKind) -> AsyncIterator[Report]:
    """The majority of the answers in each row's texts."""
    for row in rows:
        if isinstance(row, BadRow):
            yield report_of_bad(row)
            continue
        assert row.texts is not None, "only scores to replay come without texts"
        # A vote of weight zero is none: it would win where nobody else votes.
        votes = [
            extract(text, kind) if weight > 0 else None for text, weight in zip(row.texts, row.weights, strict=True)
        ]
        answer = plurality(votes, row.weights)
        winner = votes.index(answer) if answer is not None else 0
        sums = tally(votes, row.weights)
        yield _elected(row, winner) | {"answer": answer, "votes": sums, "agreement": agreement(sums)}


async def take_likeliest(rows: Iterable[Row]) -> AsyncIterator[Report]:
    """The text of the highest mean log-probability per token, under whoever wrote it: best of n without a scorer."""
    for row in rows:
        if isinstance(row, BadRow):
            yield report_of_bad(row)
            continue
        logprobs = nats_per_token(row)
        if isinstance(logprobs, BadRow):
            yield report_of_bad(logprobs)
            continue
        is_blank = np.array([logprob is None for logprob in logprobs])
        if is_blank.all():
            yield report_of_bad(BadRow(row.id, row.line, "has no text to choose from"))
            continue
        scores = np.array([-np.inf if logprob is None else logprob for logprob in logprobs])
        yield _chosen(row, ranked(scores, is_blank))


async def judge_rows(
    rows: Iterable[Row], judge: Model, *, criterion: str, explain: bool = False
) -> AsyncIterator[Report]:
    """What `judge` prefers in each row, which needs its prompt."""
    for row in rows:
        if isinstance(row, BadRow):
            yield report_of_bad(row)
            continue
        assert row.texts is not None, "only scores to replay come without texts"
        try:
            request = _asked(row)
            comparison = await compare_by_judge(judge, request, row.texts, ensemble=judge.name, criterion=criterion)
        except (EnsembleError, ValueError) as exc:
            yield report_of_bad(BadRow(row.id, row.line, str(exc)))
            continue
        ranking = ranked(comparison.scores)
        yield _chosen(row, ranking) | ({"ranking": list(ranking.ranking), **comparison.trace} if explain else {})


def _asked(row: CandidateRow) -> GenerationRequest:
    """What the candidates answer. Raises `ValueError` if the row does not say."""
    if isinstance(row.prompt, str):
        return GenerationRequest(messages=({"role": "user", "content": row.prompt},))
    if (
        isinstance(row.prompt, list)
        and row.prompt
        and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in row.prompt)
    ):
        return GenerationRequest(messages=tuple(row.prompt))
    raise ValueError("has no prompt (a text) or messages (a chat), and a judge has to know what was asked")


def _elected(row: CandidateRow, winner: int) -> Report:
    report: Report = {"id": row.id, "winner": winner, "text": row.texts[winner] if row.texts else None}
    return report if row.systems[winner] is None else report | {"system": row.systems[winner]}


def _chosen(row: CandidateRow, ranking: Consensus) -> Report:
    return _elected(row, ranking.winner) | {
        "scores": ranking.scores.tolist(),
        "margin": ranking.margin,
        "ties": [list(group) for group in ranking.ties],
    }


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
        candidates = (text for row in rows if isinstance(row, CandidateRow) for text in row.texts or ())
        texts = list(dict.fromkeys(without_thoughts(text) for text in candidates))
        return cls(embedder.name, dict(zip(texts, await embedder.embed(texts), strict=True)))

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._vectors[text] for text in texts])


async def _vote(
    row: CandidateRow,
    similarity: Mapping[str, float] | None,
    embedder: Embedder | None,
    prune: float | None,
    explain: bool,
) -> Report:
    texts = row.texts or tuple(f"candidate {index}" for index in range(len(row.weights)))
    blend = similarity or _default(row)
    known = ", ".join(row.matrices)
    if blend is None:
        error = f"there are scores of {known}: say which with --similarity"
        return report_of_bad(BadRow(row.id, row.line, error))
    if not row.matrices:
        held = await hold_vote(texts, blend, embedder=embedder, weights=row.weights, prune=prune)
    elif missing := sorted(set(blend) - set(row.matrices)):
        error = f"there are no scores of {missing[0]!r} to replay (there are: {known})"
        return report_of_bad(BadRow(row.id, row.line, error))
    else:
        held = count(texts, row.matrices, blend, weights=row.weights, prune=prune)
    full = held.report()
    report = _elected(row, held.consensus.winner) | {key: full[key] for key in ("scores", "margin", "ties")}
    if explain:
        report |= {key: value for key, value in full.items() if key not in report}
    if explain and row.texts:
        report["candidates"] = [
            {"text": text, "weight": weight, "system": system}
            for text, weight, system in zip(row.texts, row.weights, row.systems, strict=True)
        ]
    return report


def _default(row: CandidateRow) -> dict[str, float] | None:
    """The only similarity that there are scores of, or the default one."""
    if len(row.matrices) == 1:
        return dict.fromkeys(row.matrices, 1.0)
    return {DEFAULT_SIMILARITY: 1.0} if not row.matrices or DEFAULT_SIMILARITY in row.matrices else None
