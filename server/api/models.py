"""/v1/models, and how a request's `model` becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.errors import RequestError, UnknownModelError
from ensemble_server.ensembles.method import Method
from ensemble_server.server.api.errors import documented, shortened
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.requests.responses import JSONResponse, ModelList, ModelObject

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

OWNER = "ensemble-server"


def requested_model(hosting: Hosting, name: str | None) -> Model:
    """The model a request names; the only listed one if it names none.

    Models that are not listed answer too: they are hidden, not locked. Raises `RequestError` or `UnknownModelError`.
    """
    if name is None:
        if len(hosting.listed) != 1:
            raise RequestError(f"model is missing; one of: {', '.join(hosting.listed)}", param="model")
        name = hosting.listed[0]
    if name not in hosting.models:
        raise unknown_model(name, hosting.listed)
    return hosting.models[name]


def unknown_model(name: str, known: list[str]) -> UnknownModelError:
    return UnknownModelError(f"there is no model {shortened(name, 100)!r}{nearest(name[:100], known)}", param="model")


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


def models_router(hosting: Hosting) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}} | documented(401, 503))
    async def list_models() -> JSONResponse:
        """The models that clients may name, in the config's order."""
        shown = [model_object(hosting.models[name], hosting.created) for name in hosting.listed]
        return JSONResponse({"object": "list", "data": shown})

    @router.get(
        "/v1/models/{model_id:path}",
        response_model=None,
        responses={200: {"model": ModelObject}} | documented(401, 404, 503),
    )
    async def retrieve_model(model_id: str) -> JSONResponse:
        """One model. Its name may contain slashes."""
        if model_id not in hosting.models:
            raise unknown_model(model_id, hosting.listed)
        return JSONResponse(model_object(hosting.models[model_id], hosting.created))

    return router
