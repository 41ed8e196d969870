"""Is it alive, is it ready, what is it, how is it doing."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.ensembles.errors import EngineRestartingError
from ensemble_server.ensembles.method import Method
from ensemble_server.server.api.context import context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.requests.responses import Health, Version

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

PACKAGE = "ensemble-server"

router = APIRouter(tags=["health"])  # open to all but /metrics: who asks has no key


@router.get("/live", response_model=None, responses={200: {"model": Health}})
async def live() -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", response_model=None, responses={200: {"model": Health}} | documented(503))
@router.get("/health", response_model=None, responses={200: {"model": Health}} | documented(503))
async def health(request: Request) -> Response:
    """200 if requests are answered now, be it of some models only; else 503 and why not."""
    context = context_of(request)
    context.admission.check()
    return JSONResponse(health_of(context.hosting))


@router.get("/version", response_model=None, responses={200: {"model": Version}})
async def server_version() -> Response:
    return JSONResponse({"version": version(PACKAGE)})


@router.get(
    "/metrics",
    response_model=None,
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}} | documented(401),
)
async def prometheus(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(context_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def health_of(hosting: Hosting) -> Health:
    """Raises `EngineRestartingError` if none of the listed models can answer."""
    if not hosting.down:
        return {"status": "ok"}
    models = {name: hosting.models[name] for name in hosting.listed}
    parts = {name: model.singles if isinstance(model, Method) else {name} for name, model in models.items()}
    down = [name for name, singles in parts.items() if singles <= hosting.down]
    if down and len(down) == len(parts):
        raise EngineRestartingError(f"the engines of all models are being started again: {', '.join(down)}")
    impaired = [name for name, singles in parts.items() if singles & hosting.down and name not in down]
    return {"status": "degraded", "down": down, "impaired": impaired}
