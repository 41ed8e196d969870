"""Reading a request's JSON: strictly, within a size, before FastAPI validates what it says.

FastAPI reads bodies with the standard library, which takes NaN and lone surrogates, and recurses without bound. Here a
body is RFC 8259 JSON in UTF-8, at most 200 levels deep, or the client is told what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.context import context_of
from ensemble_server.server.api.errors import CLIENT_LEFT
from ensemble_server.server.requests.errors import checked

DRAIN_FACTOR = 4  # a body this many times too large is read to its end, so that its sender comes to read the 413


class JSONBodyRoute(APIRoute):
    """A route whose `body` is read strictly, is at most `server.max_body_bytes` long, and is checked here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        kinds = get_type_hints(self.endpoint, include_extras=True)
        if "body" not in kinds:
            return handle
        kind = TypeAdapter[Any](kinds["body"])

        async def read_then_handle(request: Request) -> Response:
            require_json(request)
            body = await read_body(request, context_of(request).config.max_body_bytes)
            return await handle(_ReadRequest(request, body, checked(kind, parse_json(body))))

        return read_then_handle


def require_json(request: Request) -> None:
    """Raise 415 unless the body says that it is JSON.

    A missing content type is refused too: a web page can send such a body to a server on its visitor's machine without
    asking first, a JSON one it cannot.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "the body must be JSON; send the header 'content-type: application/json'")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises 413 if it is longer than `max_bytes`; never holds more than that."""
    chunks, length = [], 0
    try:
        async for chunk in request.stream():
            length += len(chunk)
            if length <= max_bytes:
                chunks.append(chunk)
            elif length > DRAIN_FACTOR * max_bytes:
                break
    except ClientDisconnect as exc:
        raise HTTPException(CLIENT_LEFT, "the client left while it sent the body") from exc
    if length > max_bytes:
        raise HTTPException(413, f"the body may be {max_bytes} bytes long, this one is longer")
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Raises `RequestError`."""
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc


class _ReadRequest(Request):
    """A request whose body has been read and checked: FastAPI takes an instance of the kind it asks for as it is."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = value

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value
