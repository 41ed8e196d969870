"""/v1/batches: many requests in a file, answered when nobody waits, as OpenAI's clients use it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.auth import account_of, owner_of
from ensemble_server.server.api.batch_objects import BatchList, BatchObject, batch_object
from ensemble_server.server.api.context import check_open, check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.files import After, Lifetime, page_of
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.batch.job.rows import Url
from ensemble_server.server.requests.messages import WHOLE, Part

MAX_LISTED = 100
MAX_WINDOW_S = 30 * 24 * 3600
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}

Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class OutputExpiresAfter(Part):
    anchor: Literal["created_at"]
    seconds: Annotated[Lifetime, WHOLE]


class BatchBody(Part):
    """POST /v1/batches"""

    input_file_id: str = Field(max_length=100, description="an uploaded file of purpose batch")
    endpoint: Url = Field(description="the url of every line")
    completion_window: str = Field(
        pattern=r"^[1-9][0-9]{0,6}[smhd]$",
        description="24h, or any other number of seconds, minutes, hours or days, up to 30d; what is not answered by "
        "then never is",
    )
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    output_expires_after: OutputExpiresAfter | None = None


def window_s(window: str) -> int:
    """The seconds of a completion window: "24h" -> 86400. Raises `RequestError` if it is too long."""
    parts = re.fullmatch(r"(\d+)([smhd])", window)
    assert parts is not None, "the pattern of the body's field lets nothing else through"
    number, unit = parts.groups()
    seconds = int(number) * _SECONDS[unit]
    if seconds > MAX_WINDOW_S:
        raise RequestError(f"completion_window may be 30d, got {window}", param="completion_window")
    return seconds


router = APIRouter(tags=["batches"], route_class=JSONBodyRoute, dependencies=[Depends(check_open)])


@router.post(
    "/v1/batches",
    response_model=None,
    dependencies=[Depends(check_ready)],
    responses={200: {"model": BatchObject}} | documented(400, 401, 404, 408, 413, 415, 429, 500, 503, 507),
)
async def create_batch(body: BatchBody, request: Request) -> Response:
    """Begins a batch. Its lines are checked, then answered, while you ask for its state."""
    context = context_of(request)
    headers = ignored_header(context.parameters.ignored(body))
    account = account_of(request)
    assert account is not None, "the path is not open"
    batch = await context.batches.create_batch(
        owner_of(request),
        account=account.name,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        window_s=window_s(body.completion_window),
        metadata=body.metadata,
        output_expires_after_s=body.output_expires_after and body.output_expires_after.seconds,
    )
    return JSONResponse(batch_object(batch), headers=headers)


@router.get(
    "/v1/batches", response_model=None, responses={200: {"model": BatchList}} | documented(400, 401, 500, 503, 507)
)
async def list_batches(
    request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20
) -> Response:
    """The caller's batches, newest first."""
    found = await context_of(request).batches.batches(owner_of(request), after=after, limit=limit + 1)
    return JSONResponse(page_of([batch_object(batch) for batch in found], limit))


@router.get(
    "/v1/batches/{batch_id}",
    response_model=None,
    responses={200: {"model": BatchObject}} | documented(401, 404, 500, 503, 507),
)
async def retrieve_batch(batch_id: str, request: Request) -> Response:
    return JSONResponse(batch_object(await context_of(request).batches.batch(batch_id, owner_of(request))))


@router.post(
    "/v1/batches/{batch_id}/cancel",
    response_model=None,
    responses={200: {"model": BatchObject}} | documented(401, 404, 409, 500, 503, 507),
)
async def cancel_batch(batch_id: str, request: Request) -> Response:
    """Ends a batch early. What has been answered by then is in its output file."""
    return JSONResponse(batch_object(await context_of(request).batches.cancel_batch(batch_id, owner_of(request))))
