"""A chat's messages, put together from what other protocols send one after the other: texts, calls, their results.

Chat templates expect calls beside the text of the turn that made them, and one system message at the head. Here what
an assistant says and calls without a break is one message, and so are the system texts at the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.requests.messages import (
    MAX_MESSAGES,
    AssistantMessage,
    CalledFunction,
    ChatMessage,
    MadeToolCall,
    SystemMessage,
    ToolMessage,
    UserMessage,
    checked_arguments,
)


class Turns:
    """`messages` is the conversation so far."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []

    def system(self, text: str) -> None:
        match self.messages:
            case [SystemMessage(content=str(before))]:
                self.messages = [_system(f"{before}\n\n{text}")]
            case _:
                self._add(_system(text))

    def user(self, text: str) -> None:
        self._add(UserMessage.model_construct(role="user", content=text))

    def assistant(self, text: str) -> None:
        """A text after calls belongs to their message: nothing may stand between calls and their results."""
        match self._last_answer():
            case AssistantMessage(tool_calls=[_, *_], content=content) as last:
                self.messages[-1] = last.model_copy(update={"content": f"{content}\n{text}" if content else text})
            case _:
                self._add(AssistantMessage.model_construct(role="assistant", content=text))

    def call(self, at: str, call_id: str, name: str, arguments: str) -> None:
        """`at`: where the call stands in the body. Raises `RequestError` for arguments that are no JSON object."""
        function = CalledFunction.model_construct(name=name, arguments=checked_arguments(at, arguments))
        made = MadeToolCall.model_construct(id=call_id, function=function)
        last = self._last_answer()
        if last is None:
            self._add(AssistantMessage.model_construct(role="assistant", content=None, tool_calls=[made]))
        else:
            self.messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), made]})

    def result(self, call_id: str, text: str) -> None:
        self._add(ToolMessage.model_construct(role="tool", content=text, tool_call_id=call_id))

    def extend(self, messages: Iterable[ChatMessage]) -> None:
        for message in messages:
            if isinstance(message, SystemMessage) and isinstance(message.content, str):
                self.system(message.content)
            else:
                self._add(message)

    def _last_answer(self) -> AssistantMessage | None:
        last = self.messages[-1] if self.messages else None
        return last if isinstance(last, AssistantMessage) else None

    def _add(self, message: ChatMessage) -> None:
        if len(self.messages) >= MAX_MESSAGES:
            raise RequestError(f"the conversation may have {MAX_MESSAGES} messages", param="messages")
        self.messages.append(message)


def _system(text: str) -> SystemMessage:
    return SystemMessage.model_construct(role="system", content=text)


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors about a chat's parameters tell of those that the client sent: names of a chat -> of another protocol."""
    try:
        yield
    except RequestError as exc:
        _rename(exc, names)
        raise


def _rename(exc: RequestError, names: dict[str, str]) -> None:
    for chats, clients in names.items():
        if exc.param == chats or (exc.param or "").startswith((f"{chats}.", f"{chats}[")):
            message: Any = exc.args[0]
            exc.args = (message.replace(chats, clients, 1) if message.startswith(chats) else message,)
            exc.param = clients
            return
