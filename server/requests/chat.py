"""Chats: what a conversation asks for, and its answer, whole or in chunks, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ensemble_server.ensembles.base import (
    Choice,
    Delta,
    FinishReason,
    GenerationRequest,
    PromptScored,
    ToolCall,
    ToolCallDelta,
)
from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.requests.chunks import Part, streamed
from ensemble_server.server.requests.generation import (
    NOBODY,
    Generations,
    Observer,
    check_stream_options,
    extension_of,
    prompt_tokens_kept,
    sampling_of,
)
from ensemble_server.server.requests.logprobs import chat_logprobs, prompt_logprobs
from ensemble_server.server.requests.messages import template_messages
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.protocol import ChatBody
from ensemble_server.server.requests.reasoning import AskedThoughts, asked_thoughts
from ensemble_server.server.requests.responses import ChatChoice, ChatCompletion, FunctionCallObject, ToolCallObject
from ensemble_server.server.requests.structured_output import requested_grammar
from ensemble_server.server.requests.terms import Terms
from ensemble_server.server.requests.tool_use import AskedTools, asked_tools

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

# --- the request --------------------------------------------------------------------------------------------------


def chat_request(
    body: ChatBody,
    hosting: Hosting,
    *,
    model_name: str,
    tools: AskedTools | None,
    thoughts: AskedThoughts,
    terms: Terms,
) -> GenerationRequest:
    """The generation that a chat asks for. Raises `RequestError`."""
    check_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    extension = extension_of(body)
    explains = extension.explain and hosting.models[model_name].explains_tokens
    tools = tools or AskedTools(())
    sampling = sampling_of(
        body,
        tools.grammar or requested_grammar(body.response_format, body.structured_outputs),
        hosting.surface(model_name),
    )
    return GenerationRequest(
        messages=template_messages(body.messages),
        sampling=sampling,
        n=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs or explains else None,
        prompt_logprobs=body.prompt_logprobs,
        overrides=extension.overrides,
        explain=extension.explain,
        explain_top=extension.explain_top,
        tools=tools.definitions,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.parallel,
        template_kwargs=body.chat_template_kwargs or {},
        reasoning_effort=thoughts.effort,
        thinks=thoughts.thinks,
        max_reasoning_tokens=thoughts.max_tokens,
        truncate_prompt_tokens=prompt_tokens_kept(body, hosting.models[model_name]),
        deadline_s=terms.deadline_s,
        priority=terms.priority,
        request_id=terms.request_id,
    )


# --- the answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """A chat's body once it is checked: what was asked, and how it is answered, whole or as a stream.

    `unheard`: what it says about thoughts that no model which answers can be told.
    """

    body: ChatBody
    asked: GenerationRequest
    tools: AskedTools | None
    generations: Generations
    unheard: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        body: ChatBody,
        hosting: Hosting,
        terms: Terms,
        observer: Observer = NOBODY,
        *,
        must_hear: bool = False,
    ) -> Self:
        """Nothing runs yet. Raises `RequestError` for all that can be told before.

        What the body says about thoughts is a hint, which clients send to every model: it is `unheard` where nobody can
        be told. `must_hear`: it is refused there, as nobody reads the header that would say so.
        """
        model = requested_model(hosting, body.model)
        tools = asked_tools(body, hosting, model.name)
        thoughts = asked_thoughts(body, hosting, model.name)
        if must_hear:
            thoughts.check()
        asked = chat_request(body, hosting, model_name=model.name, tools=tools, thoughts=thoughts, terms=terms)
        return cls(body, asked, tools, Generations(model, [asked], hosting, terms, observer), thoughts.unheard)

    def unheard_as(self, names: Mapping[str, str]) -> list[str]:
        """`unheard`, as a protocol calls it. `names`: of a chat's parameters there."""
        return [names.get(name, name) for name in self.unheard]

    async def answer(self) -> ChatCompletion:
        """The whole answer. Runs the generation to its end."""
        [answer] = await self.generations.answers()
        completion = ChatCompletion(
            **self.generations.head("chatcmpl", "chat.completion"),
            choices=[self._choice(choice) for choice in answer.choices],
            usage=self.generations.usage,
            ensemble=self.generations.ensemble,
        )
        if answer.prompt is not None and self.body.return_token_ids:
            completion["prompt_token_ids"] = list(answer.prompt.token_ids)
        if answer.prompt is not None and self.body.prompt_logprobs is not None:
            completion["prompt_logprobs"] = prompt_logprobs(answer.prompt)
        return completion

    def stream(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer as chunks, each ready for JSON."""
        writer = ChatWriter(
            n=self.asked.n,
            has_logprobs=self.asked.top_logprobs is not None,
            has_token_ids=bool(self.body.return_token_ids),
            new_call_id=self._new_call_id,
        )
        head = self.generations.head("chatcmpl", "chat.completion.chunk")
        return streamed(self.generations, head, writer, self.body.stream_options)

    @property
    def unread_tools(self) -> tuple[str, ...]:
        """Models that have the request's tools and of which no format of calls is known: they answer in text."""
        return self.tools.unread if self.tools else ()

    def _new_call_id(self) -> str:
        """In the form that the model's own template takes back."""
        surface = self.generations.hosting.surface(self.generations.model.name)
        new_id = self.generations.terms.new_id()
        return new_id[:length] if surface and (length := surface.call_id_length) else f"call_{new_id[:24]}"

    def _choice(self, choice: Choice) -> ChatChoice:
        shown = chat_choice(
            choice,
            has_logprobs=self.asked.top_logprobs is not None,
            new_call_id=self._new_call_id,
        )
        if self.body.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown


def chat_choice(choice: Choice, *, has_logprobs: bool, new_call_id: Callable[[], str]) -> ChatChoice:
    shown: ChatChoice = {
        "index": choice.index,
        "message": {
            "role": "assistant",
            "content": choice.text if choice.text or not choice.calls else None,
            "refusal": None,
        },
        "logprobs": chat_logprobs(choice.tokens) if has_logprobs else None,
        "finish_reason": _finish_reason(choice.finish_reason, has_called=bool(choice.calls)),
        "stop_reason": choice.stop_reason,
    }
    if choice.reasoning:
        shown["message"]["reasoning_content"] = choice.reasoning
    if choice.calls:
        shown["message"]["tool_calls"] = [_call_object(call, new_call_id) for call in choice.calls]
    return shown


def _call_object(call: ToolCall, new_call_id: Callable[[], str]) -> ToolCallObject:
    function: FunctionCallObject = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or new_call_id(), "type": "function", "function": function}


def _finish_reason(reason: FinishReason | None, *, has_called: bool) -> FinishReason:
    assert reason is not None, "every choice ends with a finish_reason"
    return "tool_calls" if reason == "stop" and has_called else reason


class ChatWriter:
    """The chunks of a chat. Each choice's first has the role, its last the finish_reason and nothing else."""

    def __init__(
        self,
        *,
        n: int,
        has_logprobs: bool,
        has_token_ids: bool,
        new_call_id: Callable[[], str],
    ) -> None:
        self._n = n
        self._has_logprobs = has_logprobs
        self._has_token_ids = has_token_ids
        self._new_call_id = new_call_id
        self._have_called: set[int] = set()  # choices
        self._has_begun = False

    def parts(self, place: int, event: PromptScored | Delta) -> Iterator[Part]:
        if not self._has_begun:
            self._has_begun = True
            for index in range(self._n):
                part = _chunk(index, {"role": "assistant", "content": ""})
                if self._has_token_ids and index == 0 and isinstance(event, PromptScored):
                    part["prompt_token_ids"] = event.token_ids
                yield part
        if isinstance(event, Delta):
            yield from self._delta_parts(event)

    def _delta_parts(self, event: Delta) -> Iterator[Part]:
        deltas: list[dict[str, Any]] = []
        if event.reasoning:
            deltas.append({"reasoning_content": event.reasoning})
        if event.text:
            deltas.append({"content": event.text})
        if event.calls:
            self._have_called.add(event.index)
            deltas += [{"tool_calls": [_call_delta(piece, self._new_call_id)]} for piece in event.calls]
        logprobs = chat_logprobs(event.tokens) if self._has_logprobs and event.tokens else None
        token_ids = event.token_ids if self._has_token_ids else ()
        if not deltas and (logprobs or token_ids):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            part = _chunk(event.index, delta, None if place else logprobs)
            if token_ids and not place:
                part["choices"][0]["token_ids"] = token_ids
            yield part
        if event.finish_reason:
            part = _chunk(event.index, {})
            part["choices"][0] |= {
                "finish_reason": _finish_reason(event.finish_reason, has_called=event.index in self._have_called),
                "stop_reason": event.stop_reason,
            }
            yield part


def _chunk(index: int, delta: dict[str, Any], logprobs: Any = None) -> Part:
    return {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}]}


def _call_delta(piece: ToolCallDelta, new_call_id: Callable[[], str]) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id or new_call_id(), "type": "function", "function": function}
