"""Every error that an answer can end with: which status, and what the OpenAI error object says.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}     all four keys, always

`KINDS` is the one table from `ensembles.errors` to statuses and codes; rows of a batch have them, too. Messages repeat
at most `MAX_INPUT_CHARS` of what a client sent, so that a small body cannot cause a large answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ensemble_server.ensembles import errors

MAX_INPUT_CHARS = 100
MAX_MESSAGE_CHARS = 1000
MAX_FINDINGS = 10

Body = TypeVar("Body")


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
    errors.ForbiddenModelError: ErrorKind(403, "permission_error", "model_not_allowed"),
    errors.QuotaError: ErrorKind(413, "invalid_request_error", "upload_quota_exceeded"),
    errors.NotFoundError: ErrorKind(404, "invalid_request_error", "not_found"),
    errors.ConflictError: ErrorKind(409, "invalid_request_error", "conflict"),
    errors.ContextLengthError: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
    errors.UnsupportedError: ErrorKind(400, "invalid_request_error", "unsupported_parameter"),
    errors.OverloadedError: ErrorKind(429, "rate_limit_error", "queue_full"),
    errors.RateLimitError: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.EngineRestartingError: ErrorKind(503, "server_error", "engine_restarting"),
    errors.StorageError: ErrorKind(507, "server_error", "storage_full"),
    errors.FolderInUseError: ErrorKind(503, "server_error", "folder_in_use"),
    errors.StorageBusyError: ErrorKind(503, "server_error", "storage_busy"),
    errors.StorageDamagedError: ErrorKind(503, "server_error", "storage_damaged"),
    errors.DeadlineError: ErrorKind(504, "timeout_error", "deadline_exceeded"),
    errors.MemberError: ErrorKind(502, "server_error", "member_failed"),
    errors.MemberTimeoutError: ErrorKind(504, "timeout_error", "member_timed_out"),
    errors.TurnoutError: ErrorKind(503, "server_error", "turnout_too_low"),
    errors.EngineDeadError: ErrorKind(503, "server_error", "engine_dead"),
}


def kind_of(error: errors.EnsembleError) -> ErrorKind:
    """The row of `KINDS` of the error's class, or of the nearest class above it."""
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`: ("abcdef", 4) -> "abc…" """
    return text if len(text) <= limit else text[: limit - 1] + "…"


def error_object(exc: BaseException) -> tuple[ErrorKind, ErrorObject]:
    """Status and error object of any exception. What is not meant for clients says only that the server failed."""
    match exc:
        case BodyError():
            kind, message, param = replace(kind_of(exc), code=exc.code), str(exc), exc.param
        case errors.EnsembleError():
            kind, message, param = kind_of(exc), str(exc), getattr(exc, "param", None)
        case _:
            kind = KINDS[errors.EnsembleError]
            message, param = "the server failed on this request; its log has the cause", None
    return kind, object_of(kind, message, param)


def object_of(kind: ErrorKind, message: str, param: str | None = None) -> ErrorObject:
    return {
        "message": shortened(message, MAX_MESSAGE_CHARS),
        "type": kind.type,
        "param": param and shortened(param, MAX_INPUT_CHARS),
        "code": kind.code,
    }


# --- what pydantic found ------------------------------------------------------------------------------------------

FINDING_CODES = {
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "unknown_parameter": "unknown_parameter",
}
_SENTENCES = {"missing", "value_error", *FINDING_CODES}  # kinds of findings that say already what came


class BodyError(errors.RequestError):
    """A body that is not what its kind asks for. Built from pydantic's findings, whose locations are within `body`."""

    def __init__(self, findings: Sequence[Any], body: Any) -> None:
        sentences = [_sentence(finding, body) for finding in findings[:MAX_FINDINGS]]
        if len(findings) > MAX_FINDINGS:
            sentences.append(f"and {len(findings) - MAX_FINDINGS} more")
        path = _where(findings[0], body)
        super().__init__("; ".join(sentences), param=shortened(path, MAX_INPUT_CHARS) or None)
        self.code = FINDING_CODES.get(findings[0]["type"], "invalid_value")


def checked(kind: TypeAdapter[Body], values: Any) -> Body:
    """`values`, from JSON, as a body of this kind. Raises `BodyError`."""
    try:
        return kind.validate_python(values)
    except ValidationError as exc:
        raise BodyError(exc.errors(include_url=False), values) from exc


def _sentence(finding: Mapping[str, Any], body: Any) -> str:
    """A pydantic finding as one sentence: "temperature: Input should be less than or equal to 2, got 3"."""
    where = shortened(_where(finding, body), MAX_INPUT_CHARS) or "the body"
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


def _where(finding: Mapping[str, Any], body: Any) -> str:
    return parameter_path(finding["loc"], body, is_missing=finding["type"] == "missing")


def parameter_path(location: Sequence[str | int], body: Any, *, is_missing: bool = True) -> str:
    """Pydantic's location as OpenAI writes it: ("messages", 0, "user", "content") -> "messages[0].content"

    Pydantic also names the branches of unions it tried; those are no keys of `body` and are left out. The last part is
    kept where it is the key that is missing, if `is_missing`.
    """
    path, value = "", body
    for place, part in enumerate(location, start=1):
        is_index = isinstance(value, list)
        if _has(value, part):
            value = value[part]
        elif place < len(location) or not isinstance(value, dict) or not is_missing:
            continue
        path += f"[{part}]" if is_index else f".{part}" if path else str(part)
    return path


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)
