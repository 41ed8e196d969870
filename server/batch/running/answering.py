"""A row's body, answered in process by the same functions that answer it over HTTP: same checks, same errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from ensemble_server.ensembles.base import MemberUsage, Usage
from ensemble_server.ensembles.errors import EngineDeadError, OverloadedError, UnsupportedError
from ensemble_server.server.api.chat import Chat
from ensemble_server.server.api.completions import TextCompletion
from ensemble_server.server.api.embeddings import EmbeddingBody, embedded
from ensemble_server.server.api.errors import error_object
from ensemble_server.server.api.request_log import RequestRecord
from ensemble_server.server.batch.job.identity import body_digest, ids_from
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.running.early_stop import STOP_WHEN_DECIDED, answer_until_decided
from ensemble_server.server.metrics import Metrics
from ensemble_server.server.requests.protocol import ChatBody, CompletionBody, ParameterCheck
from ensemble_server.server.requests.terms import Terms

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)

# Unlike a client, which sees the header that lists ignored parameters, nobody watches thousands of rows.
_PARAMETERS = ParameterCheck(is_strict=True)


async def answer(
    hosting: Hosting,
    row: Row,
    *,
    priority: int = 1,
    deadline_s: float | None = None,
    metrics: Metrics | None = None,
) -> RowResult:
    """The answer to `row`, or the error that a client would have got for it, as a result like any other.

    `deadline_s`: seconds from now after which the model answers with what it has; a shorter limit of the server's
    config wins. Raises only what is not the row's own fault: `OverloadedError` (try again) and `EngineDeadError`.
    Ids follow from the row's body, so that the same row gives the same bytes; give it a seed first (`seeded`).
    """
    new_id = ids_from(body_digest(row))
    request_id = f"req-{new_id()}"
    limits = [limit for limit in (deadline_s, hosting.config.server.request_timeout_s) if limit is not None]
    terms = Terms(request_id, 0, new_id, priority=priority, deadline_s=min(limits, default=None))
    try:
        body, usage = await _answered(hosting, row, terms, metrics or _unseen_metrics())
    except (OverloadedError, EngineDeadError):
        raise
    except Exception as exc:
        kind, error = error_object(exc)
        if error["code"] == "internal_error":
            logger.error("row %r failed: %s", row.custom_id, exc, exc_info=exc)
        return RowResult(kind.status, request_id, {"error": error})
    return RowResult(200, request_id, body, usage.members, is_cut=_is_cut(body))


async def _answered(hosting: Hosting, row: Row, terms: Terms, metrics: Metrics) -> tuple[Mapping[str, Any], Usage]:
    if STOP_WHEN_DECIDED in row.body:
        return await answer_until_decided(row, terms, lambda one, of_one: _answered(hosting, one, of_one, metrics))
    record = RequestRecord(terms.request_id, "POST", row.url, "")
    match row.url:
        case "/v1/chat/completions":
            chat = Chat.of(checked_body(ChatBody, row), hosting, metrics, record, terms)
            return await chat.answer(), chat.generations.total
        case "/v1/completions":
            completion_body = checked_body(CompletionBody, row)
            completion = await TextCompletion.of(completion_body, hosting, metrics, record, terms)
            return await completion.answer(), completion.generations.total
        case "/v1/embeddings":
            vectors = await embedded(checked_body(EmbeddingBody, row), hosting.embedder)
            num_tokens = vectors["usage"]["prompt_tokens"]
            return vectors, Usage(num_tokens, 0, {vectors["model"]: MemberUsage(num_tokens)})
        case "/v1/classify":
            from ensemble_server.server.requests.classify import classify

            classified = await classify(
                hosting, row.body, priority=terms.priority, deadline_s=terms.deadline_s, request_id=terms.request_id
            )
            return classified.shown(), classified.usage


def checked_body(kind: type[Body], row: Row) -> Body:
    """The row's body as FastAPI would have read it, but strictly. Raises what the routes answer with an error."""
    try:
        body = kind.model_validate(row.body)
    except ValidationError as exc:
        found = [{**finding, "loc": ("body", *finding["loc"])} for finding in exc.errors()]
        raise RequestValidationError(found, body=row.body) from exc
    _PARAMETERS.ignored(body)
    if getattr(body, "stream", False):
        raise UnsupportedError("a row of a batch is answered as a whole; leave stream out", param="stream")
    return body


@cache
def _unseen_metrics() -> Metrics:
    """For rows that no server answers: nobody asks for these numbers, but they are counted on the way."""
    return Metrics()


def _is_cut(body: Mapping[str, Any]) -> bool:
    return any(
        choice["finish_reason"] == "length" and choice["stop_reason"] == "deadline"
        for choice in body.get("choices", ())
    )
