"""POST /v1/classify"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.generation import observer_of, terms_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.requests.classify import classify
from ensemble_server.server.requests.classify_body import ClassifyBody
from ensemble_server.server.requests.responses import ClassificationObject

router = APIRouter(tags=["classification"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])


@router.post(
    "/v1/classify",
    response_model=None,
    responses={200: {"model": ClassificationObject}}
    | documented(400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504),
)
async def create_classification(body: ClassifyBody, request: Request) -> Response:
    """Which of a few labels continues a prompt, with a probability for each."""
    context = context_of(request)
    headers = ignored_header(context.parameters.ignored(body))
    work = classify(context.hosting, body, terms_of(request), context.priors, observer_of(request))
    classified = await context.admission.answer(request.receive, work)
    return JSONResponse(classified.shown(), headers=headers)
