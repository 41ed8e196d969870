"""A crowd vote over answers that the client has already. No model is asked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from ensemble_server.ensembles.base import Embedder
from ensemble_server.ensembles.crowd_vote import hold_vote
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.ensembles.voting.similarity import SimilarityBlend
from ensemble_server.server.requests.messages import Part

MAX_CANDIDATES = 256
MAX_CHARS = 500_000  # of all candidates together; ROUGE-L takes time with its square, about a second for this


class VoteCandidate(Part):
    text: str
    weight: float = Field(default=1.0, ge=0, le=1e6, description="of its vote; 2 counts like two equal candidates")


def _as_candidate(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


class VoteBody(Part):
    """POST /v1/vote"""

    candidates: Annotated[
        list[Annotated[VoteCandidate, BeforeValidator(_as_candidate, json_schema_input_type=str | VoteCandidate)]],
        Field(min_length=1, max_length=MAX_CANDIDATES, fail_fast=True),
    ]
    similarity: SimilarityBlend = Field(
        default={"rouge_l_word": 1.0}, description="what makes two answers alike: a name, a list, or a map to weights"
    )
    prune: float | None = Field(
        default=None, ge=0, le=1, description="candidates that score below this share of the median are left out"
    )


class VoteResult(TypedDict):
    """Indices count the candidates from 0. `similarity` holds an (n, n) matrix for each name, and `matrix` their blend.

    `incomparable` maps a similarity to the candidates that it knows nothing about: blank texts.
    """

    object: Literal["vote"]
    winner: int
    text: str
    scores: list[float]
    margin: float
    ranking: list[int]
    ties: list[list[int]]
    equal_texts: list[list[int]]
    outliers: list[int]
    incomparable: dict[str, list[int]]
    similarity: dict[str, list[list[float]]]
    matrix: list[list[float]]


async def voted(body: VoteBody, embedder: Embedder | None) -> VoteResult:
    texts = [candidate.text for candidate in body.candidates]
    if (num_chars := sum(map(len, texts))) > MAX_CHARS:
        raise RequestError(f"candidates may hold {MAX_CHARS} characters together, got {num_chars}", param="candidates")
    if "embedding" in body.similarity and embedder is None:
        raise UnsupportedError("similarity: this server has no embedding model; take rouge_l_word", param="similarity")
    weights = [candidate.weight for candidate in body.candidates]
    held = await hold_vote(texts, body.similarity, embedder=embedder, weights=weights, prune=body.prune)
    return VoteResult(object="vote", text=texts[held.consensus.winner], **held.report())
