"""Crowd vote: every member answers, and the answer that is most like all the others is the reply.

    score_i = sum over candidates j != i of  w_j * sum over similarities s of  b_s S_s(i, j)

When it helps: open answers, where no two members write the same but most write about the same. It is rarely far off,
since an answer that nobody else supports cannot win; it beats a random member, not a member that is known to be best.
Cost: members x samples answers per reply, at the same time, and none for the vote itself. Needs: any models; and for
the similarity `embedding` an embedding model. A reply streams as one piece, after the vote. Tool calls are alike (1)
if they are equal (`ensembles.voting.tool_calls`) and else unlike (0), each other and any text.

Related: majority, where answers can be compared as values; ranking, where a judge compares them.

Reference: the winning entry of the WSDM Cup 2024 chose among its models' answers this way
(https://arxiv.org/abs/2402.18385); the rule is minimum Bayes risk, see `ensembles.voting.consensus`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ensemble_server.ensembles.base import Done, Embedder, Event, GenerationRequest
from ensemble_server.ensembles.candidates import CandidateConfig, candidate_calls, candidates_trace
from ensemble_server.ensembles.fan_out import answered_members, fan_out, total_usage
from ensemble_server.ensembles.text_level import EmbeddingNeed, TextLevel, as_delta, timed_choice
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting.consensus import Consensus, elect, equal_texts
from ensemble_server.ensembles.voting.similarity import (
    Blend,
    SimilarityBlend,
    blend,
    cosine_similarity,
    rouge_l,
)
from ensemble_server.ensembles.voting.tool_calls import called, with_calls

SIMILARITY_NEEDS = EmbeddingNeed("similarity", "the similarity 'embedding'", "take rouge_l_word")


@dataclass(frozen=True)
class HeldVote:
    """A vote that was held: what was compared, how, and what came of it.

    `texts`: what was compared, without thoughts; calls as `voting.tool_calls` writes them. `matrices`: (n, n) for each
    similarity, and `matrix` their blend.
    `incomparable`: the candidates that a similarity knows nothing about (blank texts); they are like no other, and
    score 0.
    """

    texts: tuple[str, ...]
    matrices: Mapping[str, np.ndarray]
    matrix: np.ndarray
    incomparable: Mapping[str, list[int]]
    consensus: Consensus

    def report(self) -> dict[str, Any]:
        """JSON-ready; indices count the candidates from 0."""
        consensus = self.consensus
        return {
            "winner": consensus.winner,
            "scores": consensus.scores.tolist(),
            "margin": consensus.margin,
            "ranking": list(consensus.ranking),
            "ties": [list(group) for group in consensus.ties],
            "equal_texts": equal_texts(self.texts),
            "outliers": list(consensus.outliers),
            "incomparable": {name: found for name, found in self.incomparable.items() if found},
            "similarity": {name: matrix.tolist() for name, matrix in self.matrices.items()},
            "matrix": self.matrix.tolist(),
        }


async def hold_vote(
    texts: Sequence[str],
    similarity: Blend,
    *,
    embedder: Embedder | None = None,
    weights: Sequence[float] | None = None,
    prune: float | None = None,
    calls: Sequence[str | None] | None = None,
) -> HeldVote:
    """The vote over at least one text, less its thoughts (`ensembles.thoughts`).

    `similarity`: of `SIMILARITIES`. `embedder`: needed for "embedding". `weights`, `prune`: as `elect` has them.
    `calls`: what answers call in place of a text, in canonical form; None for answers in text.
    """
    calls = calls or [None] * len(texts)
    texts = ["" if call is not None else without_thoughts(text) for text, call in zip(texts, calls, strict=True)]
    matrices = {}
    for name in similarity:
        if name == "embedding":
            assert embedder is not None, "whoever accepts the similarity 'embedding' has an embedder"
            matrices[name] = cosine_similarity(texts, await embedder.embed(texts))
        else:
            matrices[name] = await asyncio.to_thread(rouge_l, name, texts)
    if any(call is not None for call in calls):
        matrices = {name: with_calls(matrix, calls) for name, matrix in matrices.items()}
    shown = [text if call is None else call for text, call in zip(texts, calls, strict=True)]
    return count(shown, matrices, similarity, weights=weights, prune=prune)


def count(
    texts: Sequence[str],
    matrices: Mapping[str, np.ndarray],
    similarity: Blend,
    *,
    weights: Sequence[float] | None = None,
    prune: float | None = None,
) -> HeldVote:
    """The vote over similarities that are there already, of any name: (n, n) each."""
    matrix = blend(matrices, similarity)
    return HeldVote(
        texts=tuple(texts),
        matrices={name: matrices[name] for name in similarity},
        matrix=matrix,
        incomparable={name: np.flatnonzero(matrices[name].diagonal() == 0).tolist() for name in similarity},
        consensus=elect(matrix, weights, prune=prune),
    )


class CrowdVote(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2402.18385"
    overridable = ("weights", "samples", "similarity", "temperature", "prune", "min_turnout")

    class Config(CandidateConfig):
        similarity: SimilarityBlend = Field(
            {"rouge_l_word": 1.0}, description="what makes two answers alike: a name, a list, or a map to weights"
        )
        prune: float | None = Field(
            default=None,
            ge=0,
            le=1,
            description="answers that score below this share of the median are left out; null keeps all",
        )

        def embedding_need(self) -> EmbeddingNeed | None:
            return SIMILARITY_NEEDS if "embedding" in self.similarity else None

    config: Config

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        outcomes = await fan_out(
            candidate_calls(config, self.models, request),
            ensemble=self.name,
            min_turnout=config.min_turnout,
            deadline_s=config.deadline_s(request),
        )
        candidates = [outcome for outcome in outcomes if outcome.answer is not None]
        with timed_choice(request, self.name):
            vote = await hold_vote(
                [outcome.answer.text for outcome in candidates],
                config.similarity,
                embedder=self.services.embedder,
                weights=[config.members[outcome.call.member] for outcome in candidates],
                prune=config.prune,
                calls=[called(outcome.answer.choices[0]) for outcome in candidates],
            )
        yield as_delta(candidates[vote.consensus.winner].answer.choices[0])
        trace = None
        if request.explain:
            trace = candidates_trace(config, request, outcomes) | {"blend": dict(config.similarity)} | vote.report()
        yield Done(
            total_usage(outcome.usage for outcome in outcomes),
            config.method,
            self.members,
            turnout=len(answered_members(outcomes)),
            trace=trace,
        )
