"""POST /v1/vote"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.requests.vote import VoteBody, VoteResult, voted

router = APIRouter(tags=["vote"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/vote",
    response_model=None,
    responses={200: {"model": VoteResult}} | documented(400, 401, 408, 413, 415, 500, 503),
)
async def create_vote(body: VoteBody, request: Request) -> Response:
    """Elect the candidate that is most like all the others."""
    context = context_of(request)
    headers = ignored_header(context.parameters.ignored(body))
    result = await context.admission.answer(request.receive, voted(body, context.hosting.embedder))
    return JSONResponse(result, headers=headers)
