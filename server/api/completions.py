"""POST /v1/completions"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import STREAMABLE, generated, observer_of, terms_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.requests.completions import TextCompletion
from ensemble_server.server.requests.protocol import CompletionBody
from ensemble_server.server.requests.responses import Completion

router = APIRouter(tags=["generation"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion, **STREAMABLE}}
    | documented(400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504),
)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continues one prompt or several. Choice i of prompt p has index p * n + i."""
    ignored = context_of(request).parameters.ignored(body)
    completion = await TextCompletion.of(body, context_of(request).hosting, terms_of(request), observer_of(request))
    return await generated(completion, request, is_streamed=bool(body.stream), ignored=ignored)
