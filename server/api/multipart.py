"""Reading an upload: multipart/form-data, piece by piece to where its file goes, never as a whole into memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ensemble_server.ensembles.errors import EnsembleError, RequestError
from ensemble_server.server.api.arrival import timely
from ensemble_server.server.api.errors import CLIENT_LEFT
from ensemble_server.server.api.json_body import DRAIN_FACTOR
from ensemble_server.server.api.local_only import is_loopback_origin
from ensemble_server.server.requests.errors import shortened

MAX_FIELDS = 32
MAX_FIELD_BYTES = 4096
FRAME_BYTES = 64 * 1024  # what boundaries, headers and fields may add to a file


@dataclass
class UploadForm:
    """A form's fields in their order, and the name of its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None  # None until the file's part begins


async def read_upload(
    request: Request, write: Callable[[bytes], Awaitable[object]], *, max_bytes: int, file_field: str = "file"
) -> UploadForm:
    """Read a form with one file, whose bytes go to `write`.

    Raises 413 if the file is longer than `max_bytes`, 415 if there is no form, `RequestError` if it is not well made,
    and what `write` raises, all of them once the body has been read to its end: only then its sender reads the answer.
    """
    parser = _FormParser(_boundary(request), file_field)
    length, written = 0, 0
    try:
        async for chunk in timely(request.stream()):
            length += len(chunk)
            if length > DRAIN_FACTOR * (max_bytes + FRAME_BYTES):
                break
            if written > max_bytes or length > max_bytes + FRAME_BYTES or parser.error is not None:
                continue
            parser.feed(chunk)
            if data := parser.take():
                written += len(data)
                if written <= max_bytes:
                    try:
                        await write(data)
                    except EnsembleError as exc:
                        parser.error = exc
    except ClientDisconnect as exc:
        raise HTTPException(CLIENT_LEFT, "the client left while it sent the file") from exc
    if written > max_bytes or length > max_bytes + FRAME_BYTES:
        raise HTTPException(413, f"a file may be {max_bytes} bytes long (batch.max_file_bytes), this one is longer")
    return parser.form()


def refuse_other_origins(request: Request, allowed: tuple[str, ...]) -> None:
    """Raise 403 if a page of another origin sends the form, unless `allowed` (server.cors_origins) names that origin.

    Where nothing is allowed by name, pages on this machine are.

    Browsers send forms of any page to any server without asking it first; JSON they do not.
    """
    origin = request.headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed or (not allowed and is_loopback_origin(origin)):
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "pages of this origin may not upload files; server.cors_origins does not name it")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(415, "the body must be a form with a file; send it as multipart/form-data")
    return options[b"boundary"]


class _FormParser:
    """The callbacks of the parser. The first error waits in `error`, and nothing is parsed after it."""

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.error: Exception | None = None
        self._file_field = file_field
        self._form = UploadForm()
        self._name = ""
        self._is_file = False
        self._has_ended = False
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._file_data: list[bytes] = []
        self._field_data = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_to_header,
                    "on_header_value": self._add_to_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as exc:
            raise RequestError(f"the form's boundary cannot be used: {exc}") from exc

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            self.error = RequestError(f"the form is not valid multipart/form-data: {shortened(str(exc), 200)}")
            self.error.__cause__ = exc
        except RequestError as exc:
            self.error = exc

    def take(self) -> bytes:
        """What has come of the file since the last call."""
        data = b"".join(self._file_data)
        self._file_data.clear()
        return data

    def form(self) -> UploadForm:
        """The form, once all of it has been fed. Raises what was wrong with it."""
        if self.error is not None:
            raise self.error
        if not self._has_ended:
            raise RequestError("the form ends before its last boundary")
        if self._form.filename is None:
            raise RequestError(
                f"the form must have a part {self._file_field!r} with a filename", param=self._file_field
            )
        return self._form

    def _begin_part(self) -> None:
        self._headers = {}
        self._field_data.clear()

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise RequestError("every part of the form needs a name")
        self._name = _text(options[b"name"], "the name of a part")
        self._is_file = self._name == self._file_field
        if self._is_file:
            if b"filename" not in options:
                raise RequestError(f"{self._name} must be a file: its part needs a filename", param=self._name)
            if self._form.filename is not None:
                raise RequestError(f"the form must have one part {self._name!r}, got several", param=self._name)
            self._form.filename = _text(options[b"filename"], "the filename")
        elif len(self._form.fields) >= MAX_FIELDS:
            raise RequestError(f"the form may have {MAX_FIELDS} fields")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_data.append(data[start:end])
            return
        self._field_data += data[start:end]
        if len(self._field_data) > MAX_FIELD_BYTES:
            raise RequestError(f"a field may be {MAX_FIELD_BYTES} bytes long, this one is longer", param=self._name)

    def _end_part(self) -> None:
        if not self._is_file:
            self._form.fields[self._name] = _text(bytes(self._field_data), self._name)

    def _end(self) -> None:
        self._has_ended = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise RequestError(f"{shortened(what, 100)} is not UTF-8") from exc
