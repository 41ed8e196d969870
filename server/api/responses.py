"""POST /v1/responses, and the responses that it has stored"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.api.auth import owner_of
from ensemble_server.server.api.context import check_open, check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import STREAMABLE, generated, observer_of, terms_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.api.streaming import NamedEvents
from ensemble_server.server.requests.openai_responses.answering import Memory, ModelResponse
from ensemble_server.server.requests.openai_responses.body import ResponsesBody
from ensemble_server.server.requests.openai_responses.shapes import DeletedResponse, ResponseObject

router = APIRouter(tags=["responses"], route_class=JSONBodyRoute)
_STORED = documented(400, 401, 404, 503)


@router.post(
    "/v1/responses",
    response_model=None,
    dependencies=[Depends(check_ready)],
    responses={200: {"model": ResponseObject, **STREAMABLE}}
    | documented(400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504),
)
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answers items, as OpenAI's newer API has them; with `stream: true` as named events."""
    context = context_of(request)
    ignored = context.parameters.ignored(body)
    memory = Memory(context.stored, owner_of(request))
    # in a thread: a grammar that comes with it is compiled to be checked
    asked = await asyncio.to_thread(
        ModelResponse.of, body, context.hosting, terms_of(request), memory, observer_of(request)
    )
    return await generated(
        asked,
        request,
        is_streamed=bool(body.stream),
        ignored=[*ignored, *asked.skipped],
        unread_tools=asked.chat.unread_tools,
        framing=NamedEvents(asked.failed),
    )


@router.get(
    "/v1/responses/{response_id}",
    response_model=None,
    dependencies=[Depends(check_open)],
    responses={200: {"model": ResponseObject}} | _STORED,
)
async def retrieve_response(response_id: str, request: Request, stream: str | None = None) -> Response:
    """A response that was stored, as a whole."""
    if stream in ("true", "1"):
        raise UnsupportedError("stream cannot be honoured: a stored response comes as a whole", param="stream")
    stored = context_of(request).stored.get(owner_of(request), response_id, param="response_id")
    return JSONResponse(stored.response)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=None,
    dependencies=[Depends(check_open)],
    responses={200: {"model": DeletedResponse}} | _STORED,
)
async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets a response. Those that went on from it stay."""
    context_of(request).stored.delete(owner_of(request), response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})
