"""The application: routes, and the layers around them.

RequestLog (id, log line, metrics, last resort) → CORS → RequireKey → KeepLimits → AnswerHead → routes
"""

from __future__ import annotations

import copy
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic import TypeAdapter

from ensemble_server.server.api import (
    batches,
    chat,
    classify,
    completions,
    embeddings,
    files,
    health,
    messages,
    models,
    responses,
    tokenization,
    usage,
    vote,
)
from ensemble_server.server.api.admission import Admission
from ensemble_server.server.api.auth import RequireKey, is_open
from ensemble_server.server.api.context import Context
from ensemble_server.server.api.errors import documented, install_error_handlers, is_for_messages
from ensemble_server.server.api.head import AnswerHead
from ensemble_server.server.api.health import PACKAGE
from ensemble_server.server.api.limits import LIMIT_HEADERS, UNCOUNTED, KeepLimits
from ensemble_server.server.api.local_only import LOOPBACK_ORIGIN
from ensemble_server.server.api.page import install_page
from ensemble_server.server.api.request_log import RequestLog
from ensemble_server.server.batch.uploads.service import BatchService
from ensemble_server.server.limits.accounts import Accounts
from ensemble_server.server.requests.anthropic_messages.errors import MessagesErrorResponse
from ensemble_server.server.requests.errors import ErrorResponse
from ensemble_server.server.requests.openai_responses.stored import StoredResponses
from ensemble_server.server.requests.protocol import ParameterCheck

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.metrics import Metrics

ROUTES = [
    route
    for part in (
        *(health, models, chat, responses, messages, completions, classify, embeddings, vote, tokenization),
        *(files, batches, usage),
    )
    for route in part.router.routes
]
EXPOSED_HEADERS = ["x-request-id", "request-id", "x-ignored-parameters", "retry-after", *LIMIT_HEADERS]


def create_app(hosting: Hosting, *, metrics: Metrics) -> FastAPI:
    """The HTTP API of `hosting`. Raises `ConfigError` if the config's keys are not what it says.

    `app.state.admission` opens and closes its door; batches run while `app.state.batches.running()` is entered.
    """
    config = hosting.config.server
    app = _routed()
    accounts = Accounts(config, metrics)
    context = Context(
        hosting,
        metrics,
        Admission(hosting),
        BatchService(hosting, metrics, accounts),
        ParameterCheck(is_strict=config.strict_params),
        StoredResponses(config.stored_responses_mb * 2**20),
        accounts,
    )
    app.state.context = context
    app.state.admission, app.state.batches = context.admission, context.batches
    install_page(app, has_page=config.web)
    install_error_handlers(app)

    # The last added is the outermost.
    app.add_middleware(AnswerHead)
    app.add_middleware(KeepLimits)
    app.add_middleware(RequireKey, accounts=accounts)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.cors_origins,
        allow_origin_regex=None if config.cors_origins else LOOPBACK_ORIGIN,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestLog, metrics=metrics)
    _describe(app, has_keys=accounts.has_keys, has_one_model=len(hosting.listed) == 1)
    return app


def _routed() -> FastAPI:
    app = FastAPI(
        title="ensemble-server",
        version=version(PACKAGE),
        summary="Several language models behind one OpenAI-compatible API",
        docs_url=None,  # our own, which works without internet
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.routes.extend(ROUTES)  # subtle: not included, which would build each of them anew
    return app


@cache
def _document() -> dict[str, Any]:
    """What FastAPI writes of the routes. It takes a second, and is the same for all applications of a process."""
    return _routed().openapi()


def _error_schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for shape in (ErrorResponse, MessagesErrorResponse):
        schema = TypeAdapter(shape).json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs"), shape.__name__: schema}
    return schemas


_ERROR_SCHEMAS = _error_schemas()  # what `errors.documented` refers to


def _describe(app: FastAPI, *, has_keys: bool, has_one_model: bool) -> None:
    """Make the OpenAPI document true: no 422, which we never answer; keys and models where they are asked for."""

    @cache
    def openapi() -> dict[str, Any]:
        document = copy.deepcopy(_document())
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                responses = operation["responses"]
                responses.pop("422", None)
                if not has_keys:
                    responses.pop("401", None)
                elif not is_open(path):
                    operation["security"] = [{"key": []}]
                if method == "post" and not path.startswith(UNCOUNTED):
                    shape = "MessagesErrorResponse" if is_for_messages(path) else "ErrorResponse"
                    for status, refusal in documented(403, 429, shape=shape).items():  # for its key's limits
                        responses.setdefault(str(status), refusal)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(_ERROR_SCHEMAS)
        for unused in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(unused, None)
        if not has_one_model:
            for body in ("ChatBody", "CompletionBody", "ResponsesBody", "MessagesBody", "CountTokensBody"):
                components["schemas"][body]["required"].append("model")
                components["schemas"][body]["properties"]["model"] = {"type": "string"}
        if has_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi
