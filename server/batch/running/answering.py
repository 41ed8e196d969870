"""A row's body, answered in process by the same functions that answer it over HTTP: same checks, same errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, TypeAdapter

from ensemble_server.ensembles.base import MemberUsage, Usage
from ensemble_server.ensembles.errors import EngineDeadError, OverloadedError, UnsupportedError
from ensemble_server.server.batch.job.identity import body_digest, ids_from
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.running.early_stop import STOP_WHEN_DECIDED, answer_until_decided
from ensemble_server.server.requests.chat import Chat
from ensemble_server.server.requests.classify import Priors, classify
from ensemble_server.server.requests.classify_body import ClassifyBody
from ensemble_server.server.requests.completions import TextCompletion
from ensemble_server.server.requests.embeddings import EmbeddingBody, embedded
from ensemble_server.server.requests.errors import checked, error_object
from ensemble_server.server.requests.generation import NOBODY, Observer
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
    new_observer: Callable[[], Observer] = lambda: NOBODY,
    priors: Priors | None = None,
) -> RowResult:
    """The answer to `row`, or the error that a client would have got for it, as a result like any other.

    `deadline_s`: seconds from now after which the model answers with what it has; a shorter limit of the server's
    config wins. `new_observer`: makes one for each generation. `priors`: shared by the rows of a job. Raises only what
    is not the row's own fault: `OverloadedError` (try again) and `EngineDeadError`.
    Ids follow from the row's body, so that the same row gives the same bytes; give it a seed first (`seeded`).
    """
    new_id = ids_from(body_digest(row))
    request_id = f"req-{new_id()}"
    limits = [limit for limit in (deadline_s, hosting.config.server.request_timeout_s) if limit is not None]
    terms = Terms(request_id, 0, new_id, priority=priority, deadline_s=min(limits, default=None))
    try:
        body, usage = await _answered(hosting, row, terms, new_observer, Priors() if priors is None else priors)
    except (OverloadedError, EngineDeadError):
        raise
    except Exception as exc:
        kind, error = error_object(exc)
        if error["code"] == "internal_error":
            logger.error("row %r failed: %s", row.custom_id, exc, exc_info=exc)
        return RowResult(kind.status, request_id, {"error": error})
    return RowResult(200, request_id, body, usage.members, is_cut=_is_cut(body))


async def _answered(
    hosting: Hosting, row: Row, terms: Terms, new_observer: Callable[[], Observer], priors: Priors
) -> tuple[Mapping[str, Any], Usage]:
    if STOP_WHEN_DECIDED in row.body:
        return await answer_until_decided(
            row, terms, lambda one, of_one: _answered(hosting, one, of_one, new_observer, priors)
        )
    match row.url:
        case "/v1/chat/completions":
            chat = await asyncio.to_thread(
                Chat.of, row_body(ChatBody, row), hosting, terms, new_observer(), must_hear=True
            )
            if chat.unread_tools:  # a client is told by a header
                raise UnsupportedError(
                    f"tools: model {chat.unread_tools[0]!r} writes calls in no format that is known here; "
                    "force the call by tool_choice, or set tool_format in the config",
                    param="tools",
                )
            return await chat.answer(), chat.generations.total
        case "/v1/completions":
            completion = await TextCompletion.of(row_body(CompletionBody, row), hosting, terms, new_observer())
            return await completion.answer(), completion.generations.total
        case "/v1/embeddings":
            vectors = await embedded(row_body(EmbeddingBody, row), hosting.embedder, new_observer())
            num_tokens = vectors["usage"]["prompt_tokens"]
            return vectors, Usage(num_tokens, 0, {vectors["model"]: MemberUsage(num_tokens)})
        case "/v1/classify":
            classified = await classify(hosting, row_body(ClassifyBody, row), terms, priors, new_observer())
            return classified.shown(), classified.usage


@cache
def _adapter(kind: type[BaseModel]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def row_body(kind: type[Body], row: Row) -> Body:
    """The row's body as a client's would be read, but strictly. Raises `RequestError`."""
    body = checked(_adapter(kind), row.body)
    _PARAMETERS.ignored(body)
    if getattr(body, "stream", False):
        raise UnsupportedError("a row of a batch is answered as a whole; leave stream out", param="stream")
    return body


def _is_cut(body: Mapping[str, Any]) -> bool:
    return any(
        choice["finish_reason"] == "length" and choice["stop_reason"] == "deadline"
        for choice in body.get("choices", ())
    )
