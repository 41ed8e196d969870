"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import STREAMABLE, generated, observer_of, terms_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.requests.chat import Chat
from ensemble_server.server.requests.protocol import ChatBody
from ensemble_server.server.requests.responses import ChatCompletion

router = APIRouter(tags=["generation"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion, **STREAMABLE}}
    | documented(400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504),
)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers a conversation; with `stream: true` as server-sent events."""
    ignored = context_of(request).parameters.ignored(body)
    # in a thread: a grammar that comes with it is compiled to be checked
    chat = await asyncio.to_thread(Chat.of, body, context_of(request).hosting, terms_of(request), observer_of(request))
    return await generated(
        chat,
        request,
        is_streamed=bool(body.stream),
        ignored=[*ignored, *chat.unheard],
        unread_tools=chat.unread_tools,
    )
