"""POST /v1/messages, as Anthropic's clients ask, and /v1/messages/count_tokens"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import STREAMABLE, generated, observer_of, terms_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.api.streaming import NamedEvents
from ensemble_server.server.requests.anthropic_messages.answering import ModelMessage, counted
from ensemble_server.server.requests.anthropic_messages.body import CountTokensBody, MessagesBody
from ensemble_server.server.requests.anthropic_messages.shapes import MessageObject, TokenCount

router = APIRouter(tags=["messages"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/messages",
    response_model=None,
    responses={200: {"model": MessageObject, **STREAMABLE}}
    | documented(400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504, shape="MessagesErrorResponse"),
)
async def create_message(body: MessagesBody, request: Request) -> Response:
    """Answers a conversation of content blocks; with `stream: true` as named events."""
    ignored = context_of(request).parameters.ignored(body)
    # in a thread: a grammar that comes with it is compiled to be checked
    asked = await asyncio.to_thread(
        ModelMessage.of, body, context_of(request).hosting, terms_of(request), observer_of(request)
    )
    return await generated(
        asked,
        request,
        is_streamed=bool(body.stream),
        ignored=[*ignored, *asked.skipped],
        unread_tools=asked.chat.unread_tools,
        framing=NamedEvents(asked.failed),
    )


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses={200: {"model": TokenCount}}
    | documented(400, 401, 404, 408, 413, 415, 500, 503, shape="MessagesErrorResponse"),
)
async def count_tokens(body: CountTokensBody, request: Request) -> Response:
    """How many tokens a message's prompt has."""
    ignored = context_of(request).parameters.ignored(body)
    count = await asyncio.to_thread(counted, body, context_of(request).hosting, terms_of(request))
    return JSONResponse(count, headers=ignored_header(ignored))
