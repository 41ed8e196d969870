"""/v1/files: what batches read and what they leave, as OpenAI's clients use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.api.auth import account_of, owner_of
from ensemble_server.server.api.batch_objects import FileDeleted, FileList, FileObject, file_object
from ensemble_server.server.api.context import Context, check_open, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_response import JSONResponse, ignored_header
from ensemble_server.server.api.multipart import read_upload, refuse_other_origins
from ensemble_server.server.requests.errors import checked

MAX_LISTED = 10_000
MAX_FILENAME_CHARS = 255
CHUNK_BYTES = 256 * 1024

After = Annotated[str | None, Query(max_length=100, description="the id after which the list goes on")]
Lifetime = Annotated[int, Field(ge=3600, le=30 * 24 * 3600, description="seconds")]


class UploadFields(BaseModel):
    """What a form says besides its file. All of it is text."""

    model_config = ConfigDict(extra="allow")

    purpose: Literal["batch"]
    anchor: Literal["created_at"] | None = Field(default=None, alias="expires_after[anchor]")
    seconds: Lifetime | None = Field(default=None, alias="expires_after[seconds]")


_UPLOAD_FIELDS = TypeAdapter(UploadFields)


def _upload_body() -> dict[str, Any]:
    schema = UploadFields.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "JSONL, one request a line"}
    schema["properties"] = {"file": file, **schema["properties"]}
    schema["required"] = ["file", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


router = APIRouter(tags=["batches"], dependencies=[Depends(check_open)])


@router.post(
    "/v1/files",
    response_model=None,
    openapi_extra={"requestBody": _upload_body()},
    responses={200: {"model": FileObject}} | documented(400, 401, 403, 408, 413, 415, 500, 503, 507),
)
async def upload_file(request: Request) -> Response:
    """Keeps a file. Its bytes go to the disk as they come."""
    context = context_of(request)
    refuse_other_origins(request, context.config.cors_origins)
    account, owner = account_of(request), owner_of(request)
    assert account is not None, "the path is not open"
    num_kept = await context.batches.num_bytes_kept(owner)
    with context.admission.live_request(), account.upload(num_kept) as grow:
        new = await context.batches.new_file()

        async def write(data: bytes) -> None:
            grow(len(data))
            await context.batches.write(new, data)

        try:
            form = await read_upload(request, write, max_bytes=context.hosting.config.batch.max_file_bytes)
            fields = _upload_fields(form.fields)
            headers = ignored_header(context.parameters.ignored(fields))
            file = await context.batches.keep_file(
                new, owner=owner, filename=_plain_name(form.filename), expires_after_s=fields.seconds
            )
        except BaseException:
            await context.batches.discard(new)
            raise
    return JSONResponse(file_object(file), headers=headers)


@router.get(
    "/v1/files", response_model=None, responses={200: {"model": FileList}} | documented(400, 401, 500, 503, 507)
)
async def list_files(
    request: Request,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """The caller's files, newest first unless `order` says otherwise."""
    found = await context_of(request).batches.files(
        owner_of(request), purpose=purpose, after=after, limit=limit + 1, order=order
    )
    return JSONResponse(page_of([file_object(file) for file in found], limit))


@router.get(
    "/v1/files/{file_id}",
    response_model=None,
    responses={200: {"model": FileObject}} | documented(401, 404, 500, 503, 507),
)
async def retrieve_file(file_id: str, request: Request) -> Response:
    return JSONResponse(file_object(await context_of(request).batches.file(file_id, owner_of(request))))


@router.get(
    "/v1/files/{file_id}/content",
    response_model=None,
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
    | documented(401, 404, 500, 503, 507),
)
async def file_content(file_id: str, request: Request) -> Response:
    """The bytes of a file, as they were sent or written."""
    context = context_of(request)
    file, content = await context.batches.content(file_id, owner_of(request))
    headers = {
        "content-length": str(file.num_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_chunks(content, context), headers=headers, media_type="application/octet-stream")


@router.delete(
    "/v1/files/{file_id}",
    response_model=None,
    responses={200: {"model": FileDeleted}} | documented(401, 404, 500, 503, 507),
)
async def delete_file(file_id: str, request: Request) -> Response:
    """Deletes a file for good. A batch that has read it goes on."""
    await context_of(request).batches.delete_file(file_id, owner_of(request))
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def page_of(found: list[Any], limit: int) -> dict[str, Any]:
    """A list as OpenAI pages it. `found` holds one more than `limit` if there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }


def _upload_fields(fields: dict[str, str]) -> UploadFields:
    read = checked(_UPLOAD_FIELDS, fields)
    if (read.seconds is None) != (read.anchor is None):
        raise RequestError("expires_after needs both anchor and seconds", param="expires_after")
    return read


def _plain_name(filename: str | None) -> str:
    """What a list can show: no folders, no control characters. ("C:\\\\a\\\\b.jsonl") -> "b.jsonl" """
    name = PurePosixPath((filename or "").replace("\\", "/")).name
    return "".join(char for char in name if char.isprintable())[:MAX_FILENAME_CHARS] or "upload"


async def _chunks(content: BinaryIO, context: Context) -> AsyncIterator[bytes]:
    try:
        with context.admission.live_request():
            while chunk := await context.batches.read(content, CHUNK_BYTES):
                yield chunk
    finally:
        content.close()
