"""GET /v1/models"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Depends
from starlette.requests import Request

from ensemble_server.ensembles.base import Model, When
from ensemble_server.ensembles.method import Method
from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.responses import ModelEnsemble, ModelList, ModelObject

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

OWNER = "ensemble-server"

router = APIRouter(tags=["models"], dependencies=[Depends(check_ready)])


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}} | documented(401, 503))
async def list_models(request: Request) -> JSONResponse:
    """The models that clients may name, in the config's order, and the one that embeds."""
    hosting = context_of(request).hosting
    shown = [model_object(hosting.models[name], hosting) for name in hosting.listed]
    if await asyncio.to_thread(_embeds, hosting):
        shown.append(_embedding_model(hosting))
    return JSONResponse({"object": "list", "data": shown})


@router.get(
    "/v1/models/{model_id:path}",
    response_model=None,
    responses={200: {"model": ModelObject}} | documented(401, 403, 404, 503),
)
async def retrieve_model(model_id: str, request: Request) -> JSONResponse:
    """One model. Its name may contain slashes."""
    hosting = context_of(request).hosting
    if model_id == hosting.embedder.name and await asyncio.to_thread(_embeds, hosting):
        return JSONResponse(_embedding_model(hosting))
    return JSONResponse(model_object(requested_model(hosting, model_id), hosting))


def model_object(model: Model, hosting: Hosting) -> ModelObject:
    shown: ModelObject = {
        "id": model.name,
        "kind": _kind(model, hosting),
        "explains_tokens": model.explains_tokens,
        "object": "model",
        "created": hosting.created,
        "owned_by": OWNER,
        "max_model_len": model.max_model_len,
    }
    if isinstance(model, Method):
        shown["ensemble"] = _ensemble(model)
    return shown


def _embeds(hosting: Hosting) -> bool:
    """Whether there is an embedding model whose name is its own. Looks at the disk."""
    return hosting.embedder.name not in hosting.models and hosting.embedder.is_there


def _embedding_model(hosting: Hosting) -> ModelObject:
    """Not loaded for this, so its length is not known."""
    return {
        "id": hosting.embedder.name,
        "kind": "embedding",
        "explains_tokens": False,
        "object": "model",
        "created": hosting.created,
        "owned_by": OWNER,
        "max_model_len": None,
    }


def _kind(model: Model, hosting: Hosting) -> Literal["hosted", "remote", "ensemble"]:
    """A model that is no ensemble and that nobody here can read a prompt for is elsewhere."""
    if isinstance(model, Method):
        return "ensemble"
    return "remote" if hosting.surface(model.name) is None else "hosted"


def _ensemble(model: Method) -> ModelEnsemble:
    shown: ModelEnsemble = {
        "method": model.config.method,
        "members": list(model.members),
        "weights": {name: weight for name, weight in model.config.members.items() if isinstance(weight, int | float)},
        "overrides": list(model.overridable),
    }
    if (pool := getattr(model.config, "pool", None)) is not None:
        shown["pool"], shown["share"] = pool, getattr(model.config, "share", 0.0)
    if isinstance(when := getattr(model.config, "when", None), When):
        shown["when"] = when.model_dump(exclude_none=True)
    if getattr(model.config, "gate", None) is not None:
        shown["gate"] = True
    return shown
