"""Embeddings: the vectors of the model that similarity votes and routing use too."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator

from ensemble_server.ensembles.base import MemberUsage, Usage
from ensemble_server.ensembles.errors import ContextLengthError, UnsupportedError
from ensemble_server.server.requests.generation import NOBODY, Observer, whole
from ensemble_server.server.requests.messages import WHOLE, Part
from ensemble_server.server.requests.models import unknown_model
from ensemble_server.server.requests.protocol import MAX_EMBEDDING_INPUTS
from ensemble_server.server.requests.responses import EmbeddingList

if TYPE_CHECKING:
    from ensemble_server.server.weights.embeddings import CountingEmbedder


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of texts that is not empty")
    if len(value) > MAX_EMBEDDING_INPUTS:
        raise ValueError(f"may hold {MAX_EMBEDDING_INPUTS} texts, got {len(value)}")
    if any(type(item) in (int, float, list) for item in value):
        raise ValueError(
            "token ids cannot be embedded: they belong to another tokenizer; give texts "
            "(LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)"
        )
    if not all(isinstance(item, str) and item for item in value):
        raise ValueError("must hold texts that are not empty")
    return value


_Text = Annotated[str, Field(min_length=1)]


class EmbeddingBody(Part):
    """POST /v1/embeddings"""

    model: str | None = None
    input: Annotated[
        list[str],
        PlainValidator(
            _texts,
            json_schema_input_type=_Text | Annotated[list[_Text], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)],
        ),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        default=None, description="only the model's own number"
    )
    truncate_prompt_tokens: Annotated[int, WHOLE] | None = Field(
        default=None, description="-1: cut texts that are too long"
    )


async def embedded(body: EmbeddingBody, embedder: CountingEmbedder, observer: Observer = NOBODY) -> EmbeddingList:
    """Raises `UnknownModelError`; `ContextLengthError` for texts that would be cut, unless that was asked for."""
    if body.model not in (None, embedder.name):
        raise unknown_model(body.model, [embedder.name])
    num_tokens = await asyncio.to_thread(embedder.num_tokens, body.input)
    limit = embedder.max_tokens
    if body.dimensions not in (None, embedder.dim):
        raise UnsupportedError(f"dimensions: {embedder.name} has {embedder.dim}, no fewer", param="dimensions")
    if body.truncate_prompt_tokens not in (None, -1, limit):
        raise UnsupportedError("truncate_prompt_tokens must be -1 here", param="truncate_prompt_tokens")
    if limit is not None and body.truncate_prompt_tokens is None and max(num_tokens) > limit:
        place = num_tokens.index(max(num_tokens))
        raise ContextLengthError(
            f"input[{place}] has {num_tokens[place]} tokens, {embedder.name} reads {limit}; "
            "shorten it, or send truncate_prompt_tokens: -1 to have it cut",
            param="input",
        )
    used = sum(num_tokens) if limit is None else sum(min(number, limit) for number in num_tokens)
    with whole(observer, embedder.name) as told:
        vectors = await embedder.embed(body.input)
        told(Usage(used, 0, {embedder.name: MemberUsage(used)}))
    form = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": form(vector)} for index, vector in enumerate(vectors)
        ],
        "model": embedder.name,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
