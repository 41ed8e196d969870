"""GET /v1/models"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.method import Method
from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.requests.models import unknown_model
from ensemble_server.server.requests.responses import ModelList, ModelObject

OWNER = "ensemble-server"

router = APIRouter(tags=["models"], dependencies=[Depends(check_ready)])


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}} | documented(401, 503))
async def list_models(request: Request) -> JSONResponse:
    """The models that clients may name, in the config's order."""
    hosting = context_of(request).hosting
    shown = [model_object(hosting.models[name], hosting.created) for name in hosting.listed]
    return JSONResponse({"object": "list", "data": shown})


@router.get(
    "/v1/models/{model_id:path}",
    response_model=None,
    responses={200: {"model": ModelObject}} | documented(401, 404, 503),
)
async def retrieve_model(model_id: str, request: Request) -> JSONResponse:
    """One model. Its name may contain slashes."""
    hosting = context_of(request).hosting
    if model_id not in hosting.models:
        raise unknown_model(model_id, hosting.listed)
    return JSONResponse(model_object(hosting.models[model_id], hosting.created))


def model_object(model: Model, created: int) -> ModelObject:
    shown: ModelObject = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "max_model_len": model.max_model_len,
    }
    if isinstance(model, Method):
        shown["ensemble"] = {"method": model.config.method, "members": list(model.members)}
    return shown
