"""The bytes of a response: unpacked, in small pieces, and no more of them than a limit.

httpx unpacks whatever comes, whole pieces at a time: a gzip of 1 MB can be 1 GB of zeros.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx

MAX_ERROR_BYTES = 64 * 2**10  # of an error's body; what is beyond is not read
MAX_ANSWER_BYTES = 16 * 2**20  # of an answer in one piece
MAX_STREAM_BYTES = 256 * 2**20  # of a streamed answer

MAX_ENCODING_CHARS = 20  # of a name that is one

_PIECE = 64 * 2**10
_PIECES_OF_ERRORS = 16  # a packed error may be so many times as long as what is shown of it
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP = b"\x1f\x8b"


async def pieces_of(
    response: httpx.Response, max_bytes: int, max_packed_bytes: int | None = None
) -> AsyncGenerator[bytes, None]:
    """The body of an open response. Other tasks run between two pieces.

    Raises `ValueError` when it is longer than `max_bytes`, packed (by default too) or unpacked, or packed in a way that
    is not known or broken. What stands behind a packed body is left; another packed part of it (gzip) is read.
    """
    num_bytes = num_packed = 0
    max_packed = max_bytes if max_packed_bytes is None else max_packed_bytes
    unpack = _unpacker(response.headers.get("Content-Encoding", ""))
    body: Any = response.aiter_raw()  # httpx promises an iterator; it is a generator, which wants to be closed
    async with aclosing(body) as raw:
        async for data in raw:
            left = data
            num_packed += len(data)
            if num_packed > max_packed:  # packed parts may hold nothing, and come without end
                raise ValueError(f"it is longer than {max_packed} bytes")
            while left:
                if unpack is not None and unpack.eof:
                    if not left.startswith(_GZIP[: len(left)]):
                        return
                    unpack = zlib.decompressobj(_GZIP_OR_ZLIB)
                piece, left = (left, b"") if unpack is None else _unpacked(unpack, left)
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise ValueError(f"it is longer than {max_bytes} bytes")
                if piece:
                    yield piece
                if left:
                    await asyncio.sleep(0)


async def beginning_of(response: httpx.Response, max_bytes: int) -> bytes:
    """As much of the body as `max_bytes` allow; what cannot be unpacked is left out."""
    found = b""
    try:
        async with aclosing(pieces_of(response, 2**63, _PIECES_OF_ERRORS * max_bytes)) as pieces:
            async for piece in pieces:
                found += piece[: max_bytes - len(found)]
                if len(found) >= max_bytes:
                    break
    except ValueError:
        pass
    return found


def _unpacker(encoding: str) -> zlib._Decompress | None:
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(_GZIP_OR_ZLIB)
        case other:
            named = f" {other!r}" if len(other) <= MAX_ENCODING_CHARS else ""
            raise ValueError(f"its Content-Encoding{named} was not asked for")


def _unpacked(unpack: zlib._Decompress, data: bytes) -> tuple[bytes, bytes]:
    """The next piece, and what of `data` has still to be unpacked."""
    try:
        return unpack.decompress(data, _PIECE), unpack.unconsumed_tail or unpack.unused_data
    except zlib.error as exc:
        raise ValueError(f"it cannot be unpacked ({exc})") from exc
