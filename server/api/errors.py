"""Every error a client can meet: which status, and what the OpenAI error object says.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}     all four keys, always

`KINDS` is the one table from `ensembles.errors` to HTTP; errors that only HTTP knows (no such route, wrong key, body
too large) are Starlette's `HTTPException` and get their type and code from `STATUS_KINDS`. Messages repeat at most
`MAX_INPUT_CHARS` of what a client sent, so that a small body cannot cause a large answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from typing_extensions import TypedDict

from ensemble_server.ensembles import errors

logger = logging.getLogger(__name__)

MAX_INPUT_CHARS = 100
MAX_MESSAGE_CHARS = 1000
MAX_FINDINGS = 10
CLIENT_LEFT = 499  # nginx's number for a client that hung up before it was answered; nobody gets to see it


class ErrorObject(TypedDict):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of every answer that is not a success."""

    error: ErrorObject


@dataclass(frozen=True)
class ErrorKind:
    status: int
    type: str
    code: str | None


KINDS: Mapping[type[errors.EnsembleError], ErrorKind] = {
    errors.EnsembleError: ErrorKind(500, "server_error", "internal_error"),
    errors.ConfigError: ErrorKind(500, "server_error", "config_error"),
    errors.ModelLoadError: ErrorKind(500, "server_error", "model_load_error"),
    errors.RequestError: ErrorKind(400, "invalid_request_error", "invalid_value"),
    errors.UnknownModelError: ErrorKind(404, "invalid_request_error", "model_not_found"),
    errors.NotFoundError: ErrorKind(404, "invalid_request_error", "not_found"),
    errors.ConflictError: ErrorKind(409, "invalid_request_error", "conflict"),
    errors.ContextLengthError: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
    errors.UnsupportedError: ErrorKind(400, "invalid_request_error", "unsupported_parameter"),
    errors.OverloadedError: ErrorKind(429, "rate_limit_error", "queue_full"),
    errors.EngineRestartingError: ErrorKind(503, "server_error", "engine_restarting"),
    errors.StorageError: ErrorKind(507, "server_error", "storage_full"),
    errors.FolderInUseError: ErrorKind(503, "server_error", "folder_in_use"),
    errors.DeadlineError: ErrorKind(504, "timeout_error", "deadline_exceeded"),
    errors.MemberError: ErrorKind(500, "server_error", "member_failed"),
    errors.TurnoutError: ErrorKind(503, "server_error", "turnout_too_low"),
    errors.EngineDeadError: ErrorKind(503, "server_error", "engine_dead"),
}

STATUS_KINDS: Mapping[int, ErrorKind] = {
    401: ErrorKind(401, "authentication_error", "invalid_api_key"),
    403: ErrorKind(403, "permission_error", "origin_not_allowed"),
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
    403: "A page of another origin may not upload files",
    404: "There is no such model, file, batch or route",
    409: "The batch has ended already",
    413: "The body is larger than server.max_body_bytes, or the file than batch.max_file_bytes",
    415: "The body is not application/json, or an upload no multipart/form-data",
    429: "The queue is full; Retry-After says when to come back",
    500: "A member failed, or the server did",
    503: "Loading, shutting down, too few members answered, the engine is dead, or batch.folder is another server's",
    504: "The time limit passed before an answer was there",
    507: "The disk is full, or batch.folder cannot be written",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors, for OpenAPI."""
    return {status: {"model": ErrorResponse, "description": DOCUMENTED[status]} for status in statuses}


def kind_of(error: errors.EnsembleError) -> ErrorKind:
    """The row of `KINDS` of the error's class, or of the nearest class above it."""
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`: ("abcdef", 4) -> "abc…" """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def error_object(exc: BaseException) -> tuple[ErrorKind, ErrorObject]:
    """Status and error object of any exception. What is not meant for clients says only that the server failed."""
    match exc:
        case errors.EnsembleError():
            kind, message, param = kind_of(exc), str(exc), getattr(exc, "param", None)
        case HTTPException():
            kind = STATUS_KINDS.get(exc.status_code, ErrorKind(exc.status_code, "invalid_request_error", None))
            message, param = str(exc.detail), None
        case RequestValidationError():
            return _validation_error(exc.errors(), exc.body)
        case _:
            kind = KINDS[errors.EnsembleError]
            message, param = "the server failed on this request; its log has the cause", None
    return kind, {
        "message": shortened(message, MAX_MESSAGE_CHARS),
        "type": kind.type,
        "param": param and shortened(param, MAX_INPUT_CHARS),
        "code": kind.code,
    }


def error_response(exc: BaseException) -> Response:
    """The answer for `exc`; failures of the server itself are logged with their traceback."""
    kind, error = error_object(exc)
    if kind.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request failed: %s", exc, exc_info=exc)
    return Response(orjson.dumps({"error": error}), kind.status, headers=headers_of(exc), media_type="application/json")


def headers_of(exc: BaseException) -> dict[str, str]:
    match exc:
        case errors.OverloadedError():
            return {"retry-after": str(max(1, math.ceil(exc.retry_after_s)))}
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
            exc = HTTPException(exc.status_code, f"there is no {where} here", headers=headers)
        return error_response(exc)

    for known in (errors.EnsembleError, HTTPException, RequestValidationError):
        app.add_exception_handler(known, answer)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What may be done with the request's path. Starlette names the methods of the first route that fits it only."""
    methods = {"DELETE", "GET", "PATCH", "POST", "PUT"}
    scopes = {method: {**request.scope, "method": method} for method in methods}
    return sorted(
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)
    )


# --- what pydantic found ------------------------------------------------------------------------------------------

_CODES = {
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "unknown_parameter": "unknown_parameter",
}
_SENTENCES = {"missing", "value_error", *_CODES}  # kinds of findings that say already what came


def _validation_error(findings: Sequence[Any], body: Any) -> tuple[ErrorKind, ErrorObject]:
    sentences = [_sentence(finding, body) for finding in findings[:MAX_FINDINGS]]
    if len(findings) > MAX_FINDINGS:
        sentences.append(f"and {len(findings) - MAX_FINDINGS} more")
    first = findings[0]
    code = _CODES.get(first["type"], "invalid_value")
    return ErrorKind(400, "invalid_request_error", code), {
        "message": shortened("; ".join(sentences), MAX_MESSAGE_CHARS),
        "type": "invalid_request_error",
        "param": shortened(parameter_path(first["loc"], body), MAX_INPUT_CHARS) or None,
        "code": code,
    }


def _sentence(finding: Mapping[str, Any], body: Any) -> str:
    """A pydantic finding as one sentence: "temperature: Input should be less than or equal to 2, got 3"."""
    where = shortened(parameter_path(finding["loc"], body), MAX_INPUT_CHARS) or "the body"
    message = shortened(finding["msg"].removeprefix("Value error, "), 2 * MAX_INPUT_CHARS)
    got = "" if finding["type"] in _SENTENCES else f", got {shown(finding.get('input'))}"
    return f"{where}: {message}{got}"


def shown(value: Any) -> str:
    """What a client sent, as JSON and short. Containers are named, not copied: they may be megabytes."""
    match value:
        case dict():
            return "an object"
        case list():
            return f"an array of {len(value)}"
        case str():
            return orjson.dumps(shortened(value, MAX_INPUT_CHARS)).decode()
        case int() if not -(2**63) <= value < 2**63:
            return "an integer beyond 64 bits"
    return orjson.dumps(value, default=str).decode()


def parameter_path(location: Sequence[str | int], body: Any) -> str:
    """Pydantic's location as OpenAI writes it: ("body", "messages", 0, "user", "content") -> "messages[0].content"

    Pydantic also names the branches of unions it tried; those are no keys of `body` and are left out. The last part is
    kept where it is the key that is missing.
    """
    if location[0] != "body":
        return ".".join(map(str, location[1:]))
    path, value = "", body
    for place, part in enumerate(location[1:], start=2):
        is_key = isinstance(value, dict) and part in value
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_key or is_index:
            value = value[part]
        elif place < len(location) or not isinstance(value, dict):
            continue
        path += f"[{part}]" if is_index else f".{part}" if path else str(part)
    return path
