"""What the routes that generate text share: how they are observed, and their answer, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.auth import account_of
from ensemble_server.server.api.context import context_of
from ensemble_server.server.api.json_response import JSONResponse, ignored_header, names_header
from ensemble_server.server.api.request_log import RecordingObserver, record_of
from ensemble_server.server.api.streaming import EventStream, Framing
from ensemble_server.server.limits.spending import Spending
from ensemble_server.server.requests.terms import Terms

STREAMABLE = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}  # of a response, for OpenAPI


class Generated(Protocol):
    """A body that has been checked, and can be answered in either way, once."""

    async def answer(self) -> Mapping[str, Any]: ...

    def stream(self) -> AsyncGenerator[dict[str, Any]]: ...


def terms_of(request: Request) -> Terms:
    return Terms.of_client(record_of(request).request_id, context_of(request).config)


def observer_of(request: Request) -> RecordingObserver:
    """Counts what a request uses: in its line of the log, in the metrics, and for its key."""
    meter, account = context_of(request).metrics.generation_meter(), account_of(request)
    return RecordingObserver(record_of(request), meter if account is None else Spending(account, meter))


async def generated(
    asked: Generated,
    request: Request,
    *,
    is_streamed: bool,
    ignored: Sequence[str],
    unread_tools: Sequence[str] = (),
    framing: Framing | None = None,
) -> Response:
    """The response to a body. `ignored`: its parameters that the client is told were ignored; `unread_tools`: models
    that it is told have no tool calls that can be read. `framing`: chunks', if it is None."""
    context = context_of(request)
    headers = ignored_header(ignored) | names_header("x-unread-tools", unread_tools)
    if not is_streamed:
        return JSONResponse(await context.admission.answer(request.receive, asked.answer()), headers=headers)
    record_of(request).stream = True
    interval_s = context.config.keep_alive_interval_s
    return EventStream(
        asked.stream(), context.admission, keep_alive_interval_s=interval_s, headers=headers, framing=framing
    )
