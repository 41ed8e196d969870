"""Texts and token ids, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.messages import Conversation, Part, Tools, template_messages
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.protocol import TokenId
from ensemble_server.server.requests.responses import DetokenizedText, Tokens
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
    messages: Conversation
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


def _kind(value: Any) -> str:
    has_messages = isinstance(value, TokenizeChat) or (isinstance(value, dict) and "messages" in value)
    return "chat" if has_messages else "text"


TokenizeBody = Annotated[
    Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")], Discriminator(_kind)
]


class DetokenizeBody(Part):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


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


async def tokenized(body: TokenizeText | TokenizeChat, hosting: Hosting) -> Tokens:
    """The token ids of a text, or of a conversation as the model reads it."""
    name, surface = requested_surface(hosting, body.model)
    token_ids = await asyncio.to_thread(_encoded, body, surface)
    texts = list(surface.tokenizer.convert_ids_to_tokens(token_ids)) if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": hosting.models[name].max_model_len,
        "tokens": token_ids,
        "token_strs": texts,
    }


def _encoded(body: TokenizeText | TokenizeChat, surface: Surface) -> list[int]:
    if isinstance(body, TokenizeText):
        return surface.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return surface.render(
        template_messages(body.messages),
        tools=[tool_definition(tool.function) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt is not False,
    )


async def detokenized(body: DetokenizeBody, hosting: Hosting) -> DetokenizedText:
    """The text of token ids."""
    _, surface = requested_surface(hosting, body.model)
    if body.tokens and max(body.tokens) >= surface.vocab_size:
        raise RequestError(
            f"tokens: id {max(body.tokens)} is outside the vocabulary of {surface.vocab_size}", param="tokens"
        )
    text = await asyncio.to_thread(surface.tokenizer.decode, body.tokens)
    assert isinstance(text, str), "of one list of ids"
    return {"prompt": text}
