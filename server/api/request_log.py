"""The outermost layer: an id for each request, one log line about it, its metrics, and the answer of last resort.

Prompts and answers are never logged; counts of their tokens are.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_server.server.api.errors import error_response, is_for_messages
from ensemble_server.server.requests.errors import shortened
from ensemble_server.server.requests.generation import Relay

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import Usage
    from ensemble_server.server.metrics import Metrics
    from ensemble_server.server.requests.generation import Observer

logger = logging.getLogger("ensemble.access")

PROBES = frozenset({"/health", "/ready", "/live", "/metrics"})  # asked every few seconds: logged at debug level only

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass
class RequestRecord:
    """What is known of a request when it ends. Routes fill in what they learn."""

    request_id: str
    method: str
    path: str
    client: str
    status: int = 0
    duration_ms: float = 0.0
    model: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    key: str = ""  # its name
    refusal: str = ""  # why it was turned away, if it was


class RecordingObserver(Relay):
    """Notes in `record` what generations used (`requests.generation.Observer`), and passes all on."""

    def __init__(self, record: RequestRecord, then: Observer) -> None:
        super().__init__(then)
        self._record = record

    def began(self, model: str) -> None:
        self._record.model = model
        super().began(model)

    def ended(self, usage: Usage | None) -> None:
        if usage is not None:
            self._record.prompt_tokens, self._record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        super().ended(usage)


def record_of(request: Request) -> RequestRecord:
    return request.scope["state"]["record"]


def request_id_from(headers: Headers) -> str:
    """The client's own `x-request-id` if it is short and harmless, else a fresh one."""
    sent = headers.get("x-request-id", "")
    return sent if _SANE_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"


class RequestLog:
    """ASGI layer around all others."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=request_id_from(Headers(scope=scope)),
            method=scope["method"],
            path=shortened(scope["path"], 200),
            client=scope["client"][0] if scope.get("client") else "",
        )
        scope.setdefault("state", {})["record"] = record
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                if is_for_messages(scope["path"]):
                    headers["request-id"] = record.request_id  # Anthropic's name of it
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as exc:
            record.error = type(exc).__name__
            if record.status:  # half an answer is out: only closing the connection can tell the client
                raise
            await error_response(exc, scope["path"])(scope, receive, send_with_id)
        finally:
            duration_s = time.perf_counter() - started
            record.duration_ms = round(1000 * duration_s, 1)
            self._metrics.observe_request(record.model, record.status, duration_s, record.refusal)
            level = logging.DEBUG if record.path in PROBES else logging.INFO
            logger.log(level, _line(record), extra={"fields": asdict(record)})


def _line(record: RequestRecord) -> str:
    line = f"{record.method} {record.path!r} {record.status} {record.duration_ms:.1f} ms {record.request_id}"
    if record.model:
        line += f" {record.model} {record.prompt_tokens}+{record.completion_tokens} tokens"
    return f"{line} {record.error}" if record.error else line
