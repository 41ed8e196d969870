"""However a form is cut into pieces, it is the same form; and no form makes the parser fail in ways of its own."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.multipart import UploadForm, read_upload

HEADERS = [(b"content-type", b"multipart/form-data; boundary=xYx")]


def form(content: bytes, purpose: str = "batch") -> bytes:
    return (
        b'--xYx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode() + b"\r\n"
        b'--xYx\r\nContent-Disposition: form-data; name="file"; filename="f.jsonl"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--xYx--\r\n"
    )


def read(body: bytes, cuts: list[int], max_bytes: int = 10_000) -> tuple[UploadForm, bytes]:
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    pieces = [body[begin:end] for begin, end in itertools.pairwise(edges)]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    arriving = iter(messages)

    async def receive():
        return next(arriving)

    request = Request({"type": "http", "method": "POST", "headers": HEADERS}, receive)
    written = bytearray()

    async def write(data):
        written.extend(data)

    read_form = asyncio.run(read_upload(request, write, max_bytes=max_bytes))
    return read_form, bytes(written)


@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from([b"\r\n", b"--", b"xYx", b"\n", b"-"]), max_size=20).map(b"".join),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_pieces_do_not_matter(content, cuts):
    if b"\r\n--xYx" in b"\r\n" + content + b"\r\n":
        return
    read_form, written = read(form(content), cuts)
    assert written == content
    assert read_form == UploadForm({"purpose": "batch"}, "f.jsonl")


@given(st.binary(max_size=200), st.lists(st.integers(0, 400), max_size=4), st.integers(0, 400))
def test_bytes_that_are_no_form_are_the_clients_error(noise, cuts, place):
    whole = form(b"content")
    place %= len(whole)
    try:
        read(whole[:place] + noise + whole[place:], cuts)
    except (RequestError, HTTPException) as exc:
        assert str(exc)


@pytest.mark.parametrize(("size", "fits"), [(10_000, True), (10_001, False), (200_000, False)])
def test_a_file_of_the_largest_size_passes_and_one_byte_more_does_not(size, fits):
    if fits:
        assert len(read(form(b"x" * size), [])[1]) == size
        return
    with pytest.raises(HTTPException) as caught:
        read(form(b"x" * size), [5000, 50_000])
    assert caught.value.status_code == 413


def test_more_fields_than_a_form_needs_are_refused():
    field = b'--xYx\r\nContent-Disposition: form-data; name="%d"\r\n\r\nv\r\n'
    body = b"".join(field % number for number in range(100)) + form(b"x")
    with pytest.raises(RequestError, match="32 fields"):
        read(body, [])
