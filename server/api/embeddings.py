"""POST /v1/embeddings"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import observer_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.requests.embeddings import EmbeddingBody, embedded
from ensemble_server.server.requests.responses import EmbeddingList

router = APIRouter(tags=["embeddings"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/embeddings",
    response_model=None,
    responses={200: {"model": EmbeddingList}} | documented(400, 401, 404, 408, 413, 415, 500, 503),
)
async def create_embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Unit vectors of one text or several."""
    context = context_of(request)
    headers = ignored_header(context.parameters.ignored(body))
    work = embedded(body, context.hosting.embedder, observer_of(request))
    answer = await context.admission.answer(request.receive, work)
    return JSONResponse(answer, headers=headers)
