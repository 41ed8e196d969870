"""Errors as Anthropic's clients read them. `details` has what OpenAI's error object calls `code` and `param`."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from ensemble_server.server.requests.errors import ErrorObject

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetails(TypedDict):
    error_code: str | None
    param: str | None


class MessageErrorObject(TypedDict):
    type: str
    message: str
    details: ErrorDetails


class MessagesErrorResponse(TypedDict):
    type: Literal["error"]
    error: MessageErrorObject


def message_error(status: int, error: ErrorObject) -> MessagesErrorResponse:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details: ErrorDetails = {"error_code": error["code"], "param": error["param"]}
    return {"type": "error", "error": {"type": kind, "message": error["message"], "details": details}}
