"""The application: routes, and the layers around them.

RequestLog (id, log line, metrics, last resort) → CORS → RequireKey → routes
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from ensemble_server.server.api.admission import Admission
from ensemble_server.server.api.auth import OPEN_PATHS, RequireKey, configured_keys
from ensemble_server.server.api.batches import batches_router
from ensemble_server.server.api.chat import chat_router
from ensemble_server.server.api.completions import completions_router
from ensemble_server.server.api.embeddings import embeddings_router
from ensemble_server.server.api.errors import install_error_handlers
from ensemble_server.server.api.files import files_router
from ensemble_server.server.api.health import PACKAGE, health_router, metrics_router
from ensemble_server.server.api.models import models_router
from ensemble_server.server.api.request_log import RequestLog
from ensemble_server.server.api.tokenization import tokenization_router
from ensemble_server.server.api.vote import vote_router
from ensemble_server.server.batch.uploads.service import BatchService

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.metrics import Metrics

EXPOSED_HEADERS = ["x-request-id", "x-ignored-parameters", "retry-after"]


def create_app(hosting: Hosting, *, metrics: Metrics) -> FastAPI:
    """The HTTP API of `hosting`.

    `app.state.admission` opens and closes its door; batches run while `app.state.batches.running()` is entered.
    """
    config = hosting.config.server
    app = FastAPI(
        title="ensemble-server",
        version=version(PACKAGE),
        summary="Several language models behind one OpenAI-compatible API",
        redoc_url=None,
        redirect_slashes=False,
    )
    admission = Admission(hosting)
    app.state.admission = admission
    batches = BatchService(hosting, metrics)
    app.state.batches = batches

    app.include_router(health_router(hosting, admission))
    app.include_router(metrics_router(metrics))
    for router in (
        models_router(hosting),
        chat_router(hosting, metrics, admission),
        completions_router(hosting, metrics, admission),
        embeddings_router(hosting, admission),
        vote_router(hosting, admission),
        tokenization_router(hosting),
    ):
        app.include_router(router, dependencies=[Depends(admission.check)])
    for router in (files_router(hosting, batches, admission), batches_router(hosting, batches, admission)):
        app.include_router(router, dependencies=[Depends(admission.check_open)])
    install_error_handlers(app)

    # The last added is the outermost.
    keys = configured_keys(config)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestLog, metrics=metrics)
    _describe(app, has_keys=bool(keys), has_one_model=len(hosting.listed) == 1)
    return app


def _describe(app: FastAPI, *, has_keys: bool, has_one_model: bool) -> None:
    """Make the OpenAPI document true: no 422, which we never answer; keys and models where they are asked for."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = describe()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if not has_keys:
                    operation["responses"].pop("401", None)
                elif path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
        components = document.setdefault("components", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(unused, None)
        if not has_one_model:
            for body in ("ChatBody", "CompletionBody"):
                components["schemas"][body]["required"].append("model")
                components["schemas"][body]["properties"]["model"] = {"type": "string"}
        if has_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi
