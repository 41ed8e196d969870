"""/tokenize, /detokenize, /tokenizer_info: at the root, in vLLM's shapes; lm-evaluation-harness needs all three."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.api.errors import documented
from ensemble_server.server.api.json_body import strict_json_route
from ensemble_server.server.api.models import requested_model
from ensemble_server.server.requests.messages import ChatMessage, ChatTool, Part, template_messages
from ensemble_server.server.requests.protocol import TokenId
from ensemble_server.server.requests.responses import DetokenizedText, JSONResponse, TokenizerInfo, Tokens
from ensemble_server.server.requests.tool_use import tool_definition

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface


class TokenizeText(Part):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Part):
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ChatTool] | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


TokenizeBody = Annotated[
    Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")],
    Discriminator(lambda value: "chat" if isinstance(value, dict) and "messages" in value else "text"),
]


class DetokenizeBody(Part):
    model: str | None = None
    tokens: list[TokenId]


def requested_surface(hosting: Hosting, name: str | None) -> tuple[str, Surface]:
    """The model that a request names, and its surface. Without a name: that of all models, if they share a vocabulary.

    Raises `RequestError`, `UnknownModelError`, or `UnsupportedError` for a model whose tokenizer is not here.
    """
    if name is None:
        surfaces = {model: surface for model in hosting.listed if (surface := hosting.surface(model)) is not None}
        if not surfaces:
            raise UnsupportedError("none of the models is hosted here, so there is no tokenizer", param="model")
        name, first = next(iter(surfaces.items()))
        if any(not _same_vocabulary(first, other) for other in surfaces.values()):
            raise RequestError(
                f"model is missing, and vocabularies differ; one of: {', '.join(surfaces)}", param="model"
            )
        return name, first
    surface = hosting.surface(requested_model(hosting, name).name)
    if surface is None:
        raise UnsupportedError(f"model {name!r} is not hosted here, so its tokenizer is not known", param="model")
    return name, surface


def _same_vocabulary(one: Surface, other: Surface) -> bool:
    return one.tokenizer is other.tokenizer or one.token_ids == other.token_ids


def tokenized(body: TokenizeText | TokenizeChat, surface: Surface) -> list[int]:
    if isinstance(body, TokenizeText):
        return surface.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return surface.render(
        template_messages(body.messages),
        tools=[tool_definition(tool.function) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt is not False,
    )


def tokenization_router(hosting: Hosting) -> APIRouter:
    router = APIRouter(tags=["tokenization"], route_class=strict_json_route(hosting.config.server.max_body_bytes))
    refusals = documented(400, 401, 404, 413, 415, 500, 503)

    @router.post("/tokenize", response_model=None, responses={200: {"model": Tokens}} | refusals)
    async def tokenize(body: TokenizeBody) -> Response:
        """The token ids of a text, or of a conversation as the model reads it."""
        name, surface = requested_surface(hosting, body.model)
        token_ids = await asyncio.to_thread(tokenized, body, surface)
        texts = surface.tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
        shown: Tokens = {
            "count": len(token_ids),
            "max_model_len": hosting.models[name].max_model_len,
            "tokens": token_ids,
            "token_strs": texts,
        }
        return JSONResponse(shown)

    @router.post("/detokenize", response_model=None, responses={200: {"model": DetokenizedText}} | refusals)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        _, surface = requested_surface(hosting, body.model)
        if body.tokens and max(body.tokens) >= surface.vocab_size:
            raise RequestError(
                f"tokens: id {max(body.tokens)} is outside the vocabulary of {surface.vocab_size}", param="tokens"
            )
        return JSONResponse({"prompt": await asyncio.to_thread(surface.decode, body.tokens)})

    @router.get(
        "/tokenizer_info",
        response_model=None,
        responses={200: {"model": TokenizerInfo}} | documented(400, 401, 404, 500, 503),
    )
    async def tokenizer_info(model: str | None = None) -> Response:
        """The special tokens and the chat template of a model."""
        _, surface = requested_surface(hosting, model)
        info: dict[str, Any] = surface.info()
        return JSONResponse(info)

    return router
