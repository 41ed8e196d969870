"""Chats: what a conversation asks for, and its answer, whole or in chunks, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ensemble_server.ensembles.base import Choice, Delta, FinishReason, GenerationRequest, PromptScored
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
from ensemble_server.server.requests.responses import ChatChoice, ChatCompletion, FunctionCallObject, ToolCallObject
from ensemble_server.server.requests.structured_output import requested_grammar
from ensemble_server.server.requests.terms import Terms
from ensemble_server.server.requests.tool_calls import Piece, ToolCallDelta, ToolCallParser
from ensemble_server.server.requests.tool_use import ToolUse, tool_use

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

# --- the request --------------------------------------------------------------------------------------------------


def chat_request(
    body: ChatBody, hosting: Hosting, *, model_name: str, tools: ToolUse | None, terms: Terms
) -> GenerationRequest:
    """The generation that a chat asks for. Raises `RequestError`."""
    check_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    extension = extension_of(body)
    explains = extension.explain and hosting.models[model_name].explains_tokens
    grammar = tools.grammar if tools and tools.grammar else None
    sampling = sampling_of(
        body,
        grammar or requested_grammar(body.response_format, body.structured_outputs),
        hosting.surface(model_name),
    )
    if tools and tools.keep_special_tokens and body.skip_special_tokens is None:
        sampling = replace(sampling, skip_special_tokens=False)
    return GenerationRequest(
        messages=template_messages(body.messages),
        sampling=sampling,
        n=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs or explains else None,
        prompt_logprobs=body.prompt_logprobs,
        overrides=extension.overrides,
        explain=extension.explain,
        explain_top=extension.explain_top,
        tools=tools.rendered if tools else (),
        template_kwargs=body.chat_template_kwargs or {},
        truncate_prompt_tokens=prompt_tokens_kept(body, hosting.models[model_name]),
        deadline_s=terms.deadline_s,
        priority=terms.priority,
        request_id=terms.request_id,
    )


# --- the answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """A chat's body once it is checked: what was asked, and how it is answered, whole or as a stream."""

    body: ChatBody
    asked: GenerationRequest
    tools: ToolUse | None
    generations: Generations

    @classmethod
    def of(cls, body: ChatBody, hosting: Hosting, terms: Terms, observer: Observer = NOBODY) -> Self:
        """Nothing runs yet. Raises `RequestError` for all that can be told before."""
        model = requested_model(hosting, body.model)
        tools = tool_use(body, hosting.surface(model.name), model.name)
        asked = chat_request(body, hosting, model_name=model.name, tools=tools, terms=terms)
        return cls(body, asked, tools, Generations(model, [asked], hosting, terms, observer))

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
            new_parser=self.tools.new_parser if self.tools else None,
            new_call_id=self._new_call_id,
        )
        head = self.generations.head("chatcmpl", "chat.completion.chunk")
        return streamed(self.generations, head, writer, self.body.stream_options)

    def _new_call_id(self) -> str:
        """In the form that the model's own template takes back."""
        surface = self.generations.hosting.surface(self.generations.model.name)
        new_id = self.generations.terms.new_id()
        return new_id[:length] if surface and (length := surface.call_id_length) else f"call_{new_id[:24]}"

    def _choice(self, choice: Choice) -> ChatChoice:
        shown = chat_choice(
            choice,
            has_logprobs=self.asked.top_logprobs is not None,
            parser=self.tools.new_parser() if self.tools else None,
            new_call_id=self._new_call_id,
        )
        if self.body.return_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown


def chat_choice(
    choice: Choice, *, has_logprobs: bool, parser: ToolCallParser | None, new_call_id: Callable[[], str]
) -> ChatChoice:
    pieces: list[Piece] = [choice.text] if parser is None else parser.feed(choice.text) + parser.close()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = _joined((piece for piece in pieces if isinstance(piece, ToolCallDelta)), new_call_id)
    shown: ChatChoice = {
        "index": choice.index,
        "message": {"role": "assistant", "content": text if text or not calls else None, "refusal": None},
        "logprobs": chat_logprobs(choice.tokens) if has_logprobs else None,
        "finish_reason": _finish_reason(choice.finish_reason, parser),
        "stop_reason": choice.stop_reason,
    }
    if choice.reasoning:
        shown["message"]["reasoning_content"] = choice.reasoning
    if calls:
        shown["message"]["tool_calls"] = calls
    return shown


def _joined(deltas: Iterator[ToolCallDelta], new_call_id: Callable[[], str]) -> list[ToolCallObject]:
    calls: list[ToolCallObject] = []
    for delta in deltas:
        if delta.name is not None:
            function: FunctionCallObject = {"name": delta.name, "arguments": ""}
            calls.append({"id": new_call_id(), "type": "function", "function": function})
        calls[-1]["function"]["arguments"] += delta.arguments
    return calls


def _finish_reason(reason: FinishReason | None, parser: ToolCallParser | None) -> FinishReason:
    assert reason is not None, "every choice ends with a finish_reason"
    return "tool_calls" if reason == "stop" and parser is not None and parser.has_called else reason


class ChatWriter:
    """The chunks of a chat. Each choice's first has the role, its last the finish_reason and nothing else."""

    def __init__(
        self,
        *,
        n: int,
        has_logprobs: bool,
        has_token_ids: bool,
        new_parser: Callable[[], ToolCallParser] | None,
        new_call_id: Callable[[], str],
    ) -> None:
        self._n = n
        self._has_logprobs = has_logprobs
        self._has_token_ids = has_token_ids
        self._new_call_id = new_call_id
        self._parsers = {index: new_parser() for index in range(n)} if new_parser else {}
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
        parser = self._parsers.get(event.index)
        if parser is None:
            deltas = [{"content": event.text}] if event.text else []
        else:
            pieces = parser.feed(event.text) + (parser.close() if event.finish_reason else [])
            deltas = [_delta_of(piece, self._new_call_id) for piece in pieces]
        if event.reasoning:
            deltas.insert(0, {"reasoning_content": event.reasoning})
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
                "finish_reason": _finish_reason(event.finish_reason, parser),
                "stop_reason": event.stop_reason,
            }
            yield part


def _chunk(index: int, delta: dict[str, Any], logprobs: Any = None) -> Part:
    return {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}]}


def _delta_of(piece: Piece, new_call_id: Callable[[], str]) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    if piece.name is None:
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
    function = {"name": piece.name, "arguments": piece.arguments}
    call_id = new_call_id()
    return {"tool_calls": [{"index": piece.index, "id": call_id, "type": "function", "function": function}]}
