"""/tokenize, /detokenize, /tokenizer_info: at the root, in vLLM's shapes; lm-evaluation-harness needs all three."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from ensemble_server.server.api.context import check_ready, context_of
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_body import JSONBodyRoute
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.requests.responses import DetokenizedText, TokenizerInfo, Tokens
from ensemble_server.server.requests.tokenization import (
    DetokenizeBody,
    TokenizeBody,
    detokenized,
    requested_surface,
    tokenized,
)

router = APIRouter(tags=["tokenization"], route_class=JSONBodyRoute, dependencies=[Depends(check_ready)])
_REFUSALS = documented(400, 401, 404, 408, 413, 415, 500, 503)


@router.post("/tokenize", response_model=None, responses={200: {"model": Tokens}} | _REFUSALS)
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The token ids of a text, or of a conversation as the model reads it."""
    return JSONResponse(await tokenized(body, context_of(request).hosting))


@router.post("/detokenize", response_model=None, responses={200: {"model": DetokenizedText}} | _REFUSALS)
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of token ids."""
    return JSONResponse(await detokenized(body, context_of(request).hosting))


@router.get(
    "/tokenizer_info",
    response_model=None,
    responses={200: {"model": TokenizerInfo}} | documented(400, 401, 404, 500, 503),
)
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The special tokens and the chat template of a model."""
    _, surface = requested_surface(context_of(request).hosting, model)
    return JSONResponse(surface.info())
