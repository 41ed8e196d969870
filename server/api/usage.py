"""GET /v1/usage"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.auth import account_of
from ensemble_server.server.api.context import context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.requests.responses import KeyUsage

router = APIRouter(tags=["usage"])


@router.get("/v1/usage", response_model=None, responses={200: {"model": KeyUsage}} | documented(401))
async def key_usage(request: Request) -> Response:
    """What the caller's key has used since the server began, and what it may use."""
    account = account_of(request)
    assert account is not None, "the path is not open"
    shown: KeyUsage = {
        "object": "usage",
        "key": account.name,
        "since": context_of(request).hosting.created,
        "requests": account.used.requests,
        "refused": account.used.refused,
        "prompt_tokens": account.used.prompt_tokens,
        "completion_tokens": account.used.completion_tokens,
        "upload_bytes": account.used.upload_bytes,
        "streams": account.num_streams,
        "models": {
            name: {"prompt_tokens": count.prompt_tokens, "completion_tokens": count.completion_tokens}
            for name, count in account.used.models.items()
        },
        "limits": account.limits.model_dump(exclude_none=True),
        "remaining": account.remaining(),
    }
    return JSONResponse(shown)
