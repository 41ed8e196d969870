"""Errors as HTTP answers: those of `requests.errors`, and those that only HTTP knows.

What only HTTP knows (no such route, wrong key, body too large) is Starlette's `HTTPException` and gets its type and
code from `STATUS_KINDS`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from ensemble_server.ensembles import errors
from ensemble_server.server.requests.anthropic_messages.errors import message_error
from ensemble_server.server.requests.errors import (
    MAX_INPUT_CHARS,
    BodyError,
    ErrorKind,
    ErrorObject,
    object_of,
    shortened,
)
from ensemble_server.server.requests.errors import error_object as told

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nginx's number for a client that hung up before it was answered; nobody gets to see it

STATUS_KINDS: Mapping[int, ErrorKind] = {
    401: ErrorKind(401, "authentication_error", "invalid_api_key"),
    403: ErrorKind(403, "permission_error", "origin_not_allowed"),
    408: ErrorKind(408, "invalid_request_error", "request_timeout"),
    404: ErrorKind(404, "invalid_request_error", "not_found"),
    405: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
    413: ErrorKind(413, "invalid_request_error", "body_too_large"),
    415: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
    CLIENT_LEFT: ErrorKind(CLIENT_LEFT, "invalid_request_error", "client_left"),
    503: ErrorKind(503, "server_error", "unavailable"),
}

# What OpenAPI shows, and schemathesis holds us to.
DOCUMENTED: Mapping[int, str] = {
    400: "The request is wrong; `param` names the field",
    401: "No valid API key",
    403: "The key may not ask this model, or a page of another origin may not upload files",
    408: "The body came too slowly",
    404: "There is no such model, file, batch or route",
    409: "The batch has ended already",
    413: "The body is larger than server.max_body_bytes, the file than batch.max_file_bytes or what its key may keep",
    415: "The body is not application/json, or an upload no multipart/form-data",
    429: "The queue is full, or a limit of the key is reached; Retry-After says when to come back",
    500: "The server failed",
    502: "A member failed on this request",
    503: "Loading, shutting down, too few members answered, the engine is dead, or batch.folder is another server's",
    504: "The time limit passed before an answer was there, or a member did not answer in time",
    507: "The disk is full, or batch.folder cannot be written",
}


def documented(*statuses: int, shape: str = "ErrorResponse") -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors, for OpenAPI. `app` adds the schema itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return {status: {"description": DOCUMENTED[status], "content": content} for status in statuses}


def error_object(exc: BaseException) -> tuple[ErrorKind, ErrorObject]:
    """As `requests.errors.error_object`, for errors of HTTP, too."""
    match exc:
        case HTTPException():
            kind = STATUS_KINDS.get(exc.status_code, ErrorKind(exc.status_code, "invalid_request_error", None))
            return kind, object_of(kind, str(exc.detail))
        case RequestValidationError():  # of a path or a query: bodies are checked by `json_body`
            findings = [{**finding, "loc": finding["loc"][1:]} for finding in exc.errors()]
            sent = {finding["loc"][0]: finding.get("input") for finding in findings}
            return told(BodyError(findings, sent))
    return told(exc)


def error_response(exc: BaseException, path: str = "") -> Response:
    """The answer for `exc`, in the shape that clients of `path` read; see `log_failure`."""
    kind, error = error_object(exc)
    log_failure("request", exc, kind)
    body = message_error(kind.status, error) if is_for_messages(path) else {"error": error}
    return Response(orjson.dumps(body), kind.status, headers=headers_of(exc), media_type="application/json")


def is_for_messages(path: str) -> bool:
    """Whether it is Anthropic's clients who ask there."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


async def refused(exc: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with `exc` from a layer, before it comes to a route."""
    note_refusal(scope, exc)
    await error_response(exc, scope["path"])(scope, receive, send)


def note_refusal(scope: Scope, exc: BaseException) -> None:
    """Leave word of why a request is turned away, for the log and the metrics."""
    if (reason := refusal(exc)) and (record := scope.get("state", {}).get("record")) is not None:
        record.refusal = reason


def refusal(exc: BaseException) -> str:
    """Why `exc` turns a request away; "" for what is no refusal, such as a wrong body or a failure."""
    match exc:
        case errors.RateLimitError():
            return exc.limit
        case errors.EngineRestartingError() | errors.EngineDeadError():
            return "unready"
        case errors.OverloadedError():
            return "queue"
        case errors.ForbiddenModelError():
            return "model"
        case errors.QuotaError():
            return "uploads"
        case HTTPException():
            return _REFUSING.get(exc.status_code, "")
    return ""


_REFUSING = {401: "key", 403: "origin", 408: "slow", 413: "size", 503: "unready"}


def log_failure(what: str, exc: BaseException, kind: ErrorKind) -> None:
    """A failure of the server itself is logged with its traceback, one of a member in one line."""
    if kind.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s failed: %s", what, exc, exc_info=exc)
    elif isinstance(exc, errors.MemberError):
        logger.warning("%s failed: %s", what, exc)


def headers_of(exc: BaseException) -> dict[str, str]:
    match exc:
        case errors.OverloadedError():
            return {"retry-after": str(max(1, math.ceil(exc.retry_after_s)))}
        case errors.StorageBusyError():
            return {"retry-after": "1"}
        case errors.ConflictError() | errors.StorageError():
            return {"x-should-retry": "false"}  # OpenAI's clients would try again, as they do on 409 and 5xx
        case HTTPException():
            return dict(exc.headers or {})
    return {}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception that a route raises in OpenAI's shape.

    Starlette's own `HTTPException` is named because its router raises that one for 404 and 405. Exceptions of no known
    class pass through to `RequestLog`, the outermost layer.
    """

    async def answer(request: Request, exc: Exception) -> Response:
        if isinstance(exc, HTTPException) and exc.status_code in (404, 405):
            where = f"{request.method} {shortened(request.url.path, MAX_INPUT_CHARS)}"
            headers = {"allow": ", ".join(_methods(app, request))} if exc.status_code == 405 else exc.headers
            meant = next((path for path in _similar_paths(request.url.path) if _has(app, request, path)), None)
            message = f"there is no {where} here" + (f"; did you mean {meant}?" if meant else "")
            exc = HTTPException(exc.status_code, message, headers=headers)
        note_refusal(request.scope, exc)
        return error_response(exc, request.url.path)

    for known in (errors.EnsembleError, HTTPException, RequestValidationError):
        app.add_exception_handler(known, answer)


def _similar_paths(path: str) -> list[str]:
    """What a client may have meant whose base URL has too little or too much of "/v1": ("/x") -> ["/v1/x", …]

    Or who mistyped it, or asks as Ollama is asked.
    """
    bare = "/" + re.sub(r"//+", "/", path).strip("/")
    while bare.startswith("/v1/"):
        bare = bare.removeprefix("/v1")
    named = next((part for part in _LAST_PARTS if bare.endswith(part)), bare)
    mistyped = get_close_matches(bare, _LAST_PARTS, n=1, cutoff=0.85)
    meant = [bare, named, *mistyped, *([_OLLAMA[bare]] if bare in _OLLAMA else [])]
    return [other for part in meant for other in (f"/v1{part}", part) if other != path]


_LAST_PARTS = (
    "/chat/completions",
    "/completions",
    "/responses",
    "/messages",
    "/embeddings",
    "/models",
    "/vote",
    "/classify",
    "/batches",
    "/files",
)


_OLLAMA = {
    "/api/chat": "/chat/completions",
    "/api/generate": "/completions",
    "/api/embed": "/embeddings",
    "/api/embeddings": "/embeddings",
    "/api/tags": "/models",
}


def _has(app: FastAPI, request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path, "root_path": ""}
    return any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What may be done with the request's path. Starlette names the methods of the first route that fits it only."""
    methods = {"DELETE", "GET", "PATCH", "POST", "PUT"}
    scopes = {method: {**request.scope, "method": method} for method in methods}
    return sorted(
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)
    )
