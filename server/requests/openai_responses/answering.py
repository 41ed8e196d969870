"""POST /v1/responses: what was asked, once it is checked, and its answer, whole or as a stream of events."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pydantic import TypeAdapter

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.chat import Chat
from ensemble_server.server.requests.errors import ErrorObject
from ensemble_server.server.requests.generation import NOBODY, Observer
from ensemble_server.server.requests.messages import ChatMessage, NamedTool
from ensemble_server.server.requests.openai_responses.body import FunctionTool, Item, ResponsesBody
from ensemble_server.server.requests.openai_responses.conversation import (
    NAMES,
    add_item,
    chat_body,
    conversation_of,
    served_tools,
    skipped_tools,
)
from ensemble_server.server.requests.openai_responses.events import Event, ResponseWriter
from ensemble_server.server.requests.openai_responses.shapes import ResponseObject
from ensemble_server.server.requests.openai_responses.stored import StoredResponses
from ensemble_server.server.requests.terms import Terms
from ensemble_server.server.requests.turns import Turns, renamed

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

logger = logging.getLogger(__name__)

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


@dataclass(frozen=True)
class Memory:
    """The responses that one key has stored."""

    stored: StoredResponses
    owner: str = ""


@dataclass
class ModelResponse:
    """`skipped`: what of the body was not read, such as tools that OpenAI would run; its client is told."""

    chat: Chat
    messages: list[ChatMessage]
    writer: ResponseWriter
    memory: Memory
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, body: ResponsesBody, hosting: Hosting, terms: Terms, memory: Memory, observer: Observer = NOBODY
    ) -> Self:
        """Nothing runs yet. Raises `RequestError`, `NotFoundError` for an earlier response that is not there."""
        stored, owner = memory.stored, memory.owner
        earlier: Iterable[ChatMessage] = ()
        if body.previous_response_id is not None:
            if stored.is_off:
                raise UnsupportedError(
                    "previous_response_id: this server stores no responses (server.stored_responses_mb: 0); send the "
                    "whole conversation as input",
                    param="previous_response_id",
                )
            earlier = stored.get(owner, body.previous_response_id, param="previous_response_id").messages
        conversation = conversation_of(body, tuple(earlier), lambda item_id: stored.item(owner, item_id))
        skipped = [*conversation.skipped, *skipped_tools(body)]
        with renamed(NAMES):
            asked = chat_body(body, conversation.messages)
            chat = Chat.of(asked, hosting, terms, observer)
        skipped += chat.unheard_as(NAMES)
        if body.text is not None and body.text.verbosity not in (None, "medium"):
            skipped.append("text.verbosity")
        stores = body.store is not False and not stored.is_off
        writer = ResponseWriter(
            _begun(body, chat, stores=stores),
            terms.new_id,
            is_summary=bool(body.reasoning and body.reasoning.summary),
        )
        return cls(chat, conversation.messages, writer, memory, skipped)

    async def answer(self) -> ResponseObject:
        """The whole response: what the last event of its stream has."""
        async with aclosing(self.stream()) as events:
            async for _ in events:
                pass
        return self.writer.response

    async def stream(self) -> AsyncGenerator[Event]:
        has_begun = False
        with renamed(NAMES):
            async with aclosing(self.chat.stream()) as chunks:
                async for chunk in chunks:
                    if not has_begun:
                        has_begun = True
                        for event in self.writer.begin():
                            yield event
                    for event in self.writer.write(chunk):
                        yield event
        last = list(self.writer.end(int(time.time())))
        self._keep()  # before its client hears that it is there
        for event in last:
            yield event

    def failed(self, error: ErrorObject) -> Iterable[Event]:
        """The events that end a stream which an error has broken off."""
        return self.writer.fail(error)

    def _keep(self) -> None:
        response = self.writer.response
        if not response["store"]:
            return
        turns = Turns()
        turns.extend(self.messages)
        items: Any = response["output"]
        try:
            for place, item in enumerate(_ITEMS.validate_python(items)):
                add_item(turns, item, f"output[{place}]", _no_reference)
        except RequestError as exc:  # a call that was cut off where nobody can read it: no conversation goes on from it
            logger.info("response %s is not stored: %s", response["id"], exc)
            return
        self.memory.stored.keep(self.memory.owner, response, turns.messages)


def _no_reference(item_id: str) -> Item:
    raise AssertionError(f"an answer refers to nothing, but to {item_id!r}")


def _begun(body: ResponsesBody, chat: Chat, *, stores: bool) -> ResponseObject:
    """The response before anything is there."""
    generations = chat.generations
    tools, tool_choice = served_tools(body)
    if isinstance(tool_choice, NamedTool):
        shown_choice: Any = {"type": "function", "name": tool_choice.function.name}
    else:
        shown_choice = tool_choice or "auto"
    return {
        "id": f"resp_{generations.terms.new_id()}",
        "object": "response",
        "created_at": generations.terms.created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": generations.model.name,
        "system_fingerprint": generations.hosting.fingerprint(generations.model.name),
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        },
        "store": stores,
        "temperature": chat.asked.sampling.temperature,
        "text": _shown_text(body),
        "tool_choice": shown_choice,
        "tools": [_shown_tool(tool) for tool in tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p if body.top_p is not None else 1.0,
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


def _shown_text(body: ResponsesBody) -> dict[str, Any]:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return {"format": {"type": "text"}}
    return {"format": wanted.model_dump(by_alias=True, exclude_unset=True)}


def _shown_tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
