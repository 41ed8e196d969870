"""POST /v1/messages: what was asked, once it is checked, and its answer, whole or as a stream; and how long it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.requests.anthropic_messages.body import CountTokensBody, MessagesBody
from ensemble_server.server.requests.anthropic_messages.conversation import NAMES, chat_body, skipped_tools
from ensemble_server.server.requests.anthropic_messages.errors import message_error
from ensemble_server.server.requests.anthropic_messages.events import Event, MessageWriter
from ensemble_server.server.requests.anthropic_messages.shapes import MessageObject, TokenCount
from ensemble_server.server.requests.chat import Chat
from ensemble_server.server.requests.errors import ErrorObject
from ensemble_server.server.requests.generation import NOBODY, Observer
from ensemble_server.server.requests.terms import Terms
from ensemble_server.server.requests.turns import renamed

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting


@dataclass
class ModelMessage:
    """`skipped`: what of the body was not read, such as tools that Anthropic would run; its client is told."""

    chat: Chat
    writer: MessageWriter
    skipped: list[str]

    @classmethod
    def of(cls, body: MessagesBody, hosting: Hosting, terms: Terms, observer: Observer = NOBODY) -> Self:
        """Nothing runs yet. Raises `RequestError` for all that can be told before."""
        with renamed(NAMES):
            chat = Chat.of(chat_body(body, body.model), hosting, terms, observer)
        skipped = [*skipped_tools(body), *chat.unheard_as(NAMES)]
        return cls(chat, MessageWriter(chat.generations.model.name, terms.new_id), skipped)

    async def answer(self) -> MessageObject:
        """The whole message: what its stream comes to."""
        async with aclosing(self.stream()) as events:
            async for _ in events:
                pass
        return self.writer.message

    async def stream(self) -> AsyncGenerator[Event]:
        with renamed(NAMES):
            async with aclosing(self.chat.stream()) as chunks:
                async for chunk in chunks:
                    for event in self.writer.write(chunk):
                        yield event
        for event in self.writer.end():
            yield event

    def failed(self, error: ErrorObject) -> Iterable[Any]:
        """The event that ends a stream which an error has broken off."""
        status = 429 if error["type"] == "rate_limit_error" else 504 if error["type"] == "timeout_error" else 500
        yield message_error(status, error)


def counted(body: CountTokensBody, hosting: Hosting, terms: Terms) -> TokenCount:
    """How many tokens the model reads of what a message would ask. Raises `RequestError`. Blocks while it renders."""
    with renamed(NAMES):
        chat = Chat.of(chat_body(body, body.model), hosting, terms)
    name = chat.generations.model.name
    surface = hosting.surface(name)
    if surface is None:
        raise UnsupportedError(f"model {name!r} is not hosted here, so its tokens cannot be counted", param="model")
    asked = chat.asked
    token_ids = surface.render(asked.messages or (), tools=asked.tools, template_kwargs=asked.told_template)
    return {"input_tokens": len(token_ids)}
