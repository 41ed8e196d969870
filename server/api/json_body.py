"""Reading a request's JSON: strictly, within a size, before FastAPI validates what it says.

FastAPI reads bodies with the standard library, which takes NaN and lone surrogates, and recurses without bound. Here a
body is RFC 8259 JSON in UTF-8, at most 200 levels deep, or the client is told what is wrong with it.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.arrival import timely
from ensemble_server.server.api.context import context_of
from ensemble_server.server.api.errors import CLIENT_LEFT
from ensemble_server.server.requests.errors import checked, shortened

SMALL_BYTES = 32 * 1024  # read and checked at once, in about a millisecond
MAX_VALUES = 400_000  # in one body; a name counts twice more, an object or a list four times: they take longer to make
MAX_PARAMETERS = 1000  # at the top of a body
COUNTED_BYTES = 256 * 1024  # at once
DRAIN_FACTOR = 4  # a body this many times too large is read to its end, so that its sender comes to read the 413

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_large_bodies = ThreadPoolExecutor(1, thread_name_prefix="large bodies")


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
            context = context_of(request)
            with context.bodies.reading() as grow:
                body = await read_body(request, context.config.max_body_bytes, grow)
                value = await _checked(kind, body)
            return await handle(_ReadRequest(request, body, value))

        return read_then_handle


def require_json(request: Request) -> None:
    """Raise 415 unless the body says that it is JSON.

    A missing content type is refused too: a web page can send such a body to a server on its visitor's machine without
    asking first, a JSON one it cannot.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "the body must be JSON; send the header 'content-type: application/json'")
    if (packed := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
        raise HTTPException(415, f"the body is packed ({shortened(packed, 40)}); send it as it is")


async def read_body(request: Request, max_bytes: int, grow: Callable[[int], None] = lambda num_bytes: None) -> bytes:
    """The whole body. Raises 413 if it is longer than `max_bytes`, never holds more than that; 408 if it is too slow.

    `grow` is told of every piece that is kept.
    """
    chunks, length = [], 0
    try:
        async for chunk in timely(request.stream()):
            length += len(chunk)
            if length <= max_bytes:
                grow(len(chunk))
                chunks.append(chunk)
            elif length > DRAIN_FACTOR * max_bytes:
                break
    except ClientDisconnect as exc:
        raise HTTPException(CLIENT_LEFT, "the client left while it sent the body") from exc
    if length > max_bytes:
        raise HTTPException(413, f"the body may be {max_bytes} bytes long, this one is longer")
    return b"".join(chunks)


async def _checked(kind: TypeAdapter[Any], body: bytes) -> Any:
    """The body's value, once it has the form of its kind. Large ones are read by a thread, for others to go on."""
    if len(body) <= SMALL_BYTES:
        return checked(kind, parse_json(body))

    def work() -> Any:
        require_few_values(body)
        value = parse_json(body)
        if isinstance(value, dict) and len(value) > MAX_PARAMETERS:
            raise RequestError(f"the body may have {MAX_PARAMETERS} parameters, got {len(value)}")
        return checked(kind, value)

    return await asyncio.get_running_loop().run_in_executor(_large_bodies, work)


def require_few_values(body: bytes) -> None:
    """Raise `RequestError` for more than `MAX_VALUES` JSON values. Parsing cannot be interrupted, counting can."""
    num_values, is_in_text = 0, False
    for start in range(0, len(body), COUNTED_BYTES):
        piece = body[start : start + COUNTED_BYTES]
        # Escapes are blanked, the second half of one that two pieces share, too.
        num_before = len(body[:start]) - len(body[:start].rstrip(b"\\")) if body[start - 1 : start] == b"\\" else 0
        piece = _ESCAPE.sub(b"  ", piece[1:] if num_before % 2 else piece)
        parts = piece.split(b'"')
        outside = b" ".join(parts[is_in_text::2])
        is_in_text ^= len(parts) % 2 == 0
        num_values += outside.count(b",") + 2 * outside.count(b":") + 4 * (outside.count(b"[") + outside.count(b"{"))
        if num_values > MAX_VALUES:
            raise RequestError(f"the body may hold {MAX_VALUES} JSON values, this one has more; send less at once")


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark. Raises `RequestError`."""
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError("the body is UTF-16; send JSON as UTF-8")
    body = body.removeprefix(codecs.BOM_UTF8)
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
