"""Completions: raw text in, raw text out, and the way to score text (`echo` with `logprobs`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ensemble_server.ensembles.base import Choice, Delta, GenerationRequest, PromptScored
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.chunks import Part, streamed
from ensemble_server.server.requests.generation import (
    NOBODY,
    Generations,
    Observer,
    PromptAnswer,
    check_stream_options,
    extension_of,
    prompt_tokens_kept,
    sampling_of,
)
from ensemble_server.server.requests.logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.protocol import CompletionBody, Prompt
from ensemble_server.server.requests.responses import Completion, CompletionChoice, CompletionLogprobs
from ensemble_server.server.requests.structured_output import requested_grammar
from ensemble_server.server.requests.terms import Terms

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface


# --- the requests -------------------------------------------------------------------------------------------------


def completion_requests(
    body: CompletionBody, hosting: Hosting, *, model_name: str, terms: Terms
) -> list[GenerationRequest]:
    """One generation per prompt. Raises `RequestError`. Blocks while it encodes, if `add_special_tokens` is false."""
    check_stream_options(body)
    if body.max_new_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1, or 0 with echo: true", param="max_tokens")
    is_scored = bool(body.echo) and body.logprobs is not None
    if is_scored and body.prompt_logprobs is not None:
        raise RequestError("echo with logprobs gives the prompt's already", param="prompt_logprobs")
    surface = hosting.surface(model_name)
    extension = extension_of(body)
    sampling = sampling_of(body, requested_grammar(body.response_format, body.structured_outputs), surface)
    explains = extension.explain and hosting.models[model_name].explains_tokens
    top_logprobs = 0 if body.logprobs is None and explains else body.logprobs
    kept = prompt_tokens_kept(body, hosting.models[model_name])
    return [
        GenerationRequest(
            prompt=_checked(prompt, surface, add_special_tokens=body.add_special_tokens is not False),
            sampling=sampling,
            n=body.n or 1,
            top_logprobs=top_logprobs,
            prompt_logprobs=body.logprobs if is_scored else body.prompt_logprobs,
            overrides=extension.overrides,
            explain=extension.explain,
            explain_top=extension.explain_top,
            truncate_prompt_tokens=kept,
            deadline_s=terms.deadline_s,
            priority=terms.priority,
            request_id=terms.request_id,
        )
        for prompt in body.prompt
    ]


def _checked(prompt: Prompt, surface: Surface | None, *, add_special_tokens: bool) -> Prompt:
    if isinstance(prompt, str):
        if add_special_tokens:
            return prompt
        if surface is None:
            raise UnsupportedError("add_special_tokens: this model is not hosted here", param="add_special_tokens")
        return tuple(surface.encode(prompt, add_special_tokens=False))
    if surface is not None and (largest := max(prompt)) >= surface.vocab_size:
        raise RequestError(
            f"prompt: token id {largest} is outside the vocabulary of {surface.vocab_size}", param="prompt"
        )
    return prompt


# --- the answer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the choices of one body show."""

    n: int
    has_echo: bool
    has_logprobs: bool
    has_prompt_logprobs: bool
    has_token_ids: bool
    explain: bool
    texts: tuple[str, ...]  # of the prompts; only if has_echo
    special_ids: frozenset[int]
    skips_special_tokens: bool

    @staticmethod
    def of(body: CompletionBody, requests: list[GenerationRequest], surface: Surface | None) -> Layout:
        """Raises `UnsupportedError` for an echo of token ids that nobody here can decode."""
        explain = requests[0].explain
        return Layout(
            n=requests[0].n,
            has_echo=bool(body.echo),
            has_logprobs=requests[0].top_logprobs is not None,
            has_prompt_logprobs=body.prompt_logprobs is not None,
            has_token_ids=bool(body.return_token_ids),
            explain=explain,
            texts=tuple(_text(prompt, surface) for prompt in body.prompt) if body.echo else (),
            special_ids=frozenset() if surface is None else surface.special_ids,
            skips_special_tokens=requests[0].sampling.skip_special_tokens,
        )

    def echo_offsets(self, place: int) -> TextOffsets:
        """Of the tokens of prompt `place`, which stand at the head of the text."""
        return TextOffsets(hidden=self.special_ids, echo=self.texts[place])

    def new_offsets(self, place: int) -> TextOffsets:
        """Of the tokens that are written after prompt `place`."""
        hidden = self.special_ids if self.skips_special_tokens else frozenset()
        return TextOffsets(len(self.texts[place]) if self.has_echo else 0, hidden=hidden)


def _text(prompt: Prompt, surface: Surface | None) -> str:
    if isinstance(prompt, str):
        return prompt
    if surface is None:
        raise UnsupportedError("echo of token ids: this model is not hosted here", param="echo")
    return surface.decode(prompt)


@dataclass(frozen=True)
class TextCompletion:
    """A completion's body once it is checked: what was asked, and how it is answered, whole or as a stream."""

    body: CompletionBody
    layout: Layout
    generations: Generations

    @classmethod
    async def of(cls, body: CompletionBody, hosting: Hosting, terms: Terms, observer: Observer = NOBODY) -> Self:
        """Nothing runs yet. Raises `RequestError` for all that can be told before."""
        model = requested_model(hosting, body.model)
        asked = await asyncio.to_thread(completion_requests, body, hosting, model_name=model.name, terms=terms)
        layout = await asyncio.to_thread(Layout.of, body, asked, hosting.surface(model.name))
        return cls(body, layout, Generations(model, asked, hosting, terms, observer))

    async def answer(self) -> Completion:
        """The whole answer. Runs all generations to their ends."""
        answers = await self.generations.answers()
        choices = [
            completion_choice(place, answer, choice, self.layout)
            for place, answer in enumerate(answers)
            for choice in answer.choices
        ]
        return Completion(
            **self.generations.head("cmpl", "text_completion"),
            choices=choices,
            usage=self.generations.usage,
            ensemble=self.generations.ensemble,
        )

    def stream(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer as chunks, each ready for JSON."""
        head = self.generations.head("cmpl", "text_completion")
        return streamed(self.generations, head, CompletionWriter(self.layout), self.body.stream_options)


def completion_choice(place: int, answer: PromptAnswer, choice: Choice, layout: Layout) -> CompletionChoice:
    """Choice `choice` of prompt `place`. An echo stands in front of the text, its tokens in front of the others."""
    echo = layout.texts[place] if layout.has_echo else ""
    scored = answer.prompt.tokens if layout.has_echo and answer.prompt is not None else ()
    logprobs = None
    if layout.has_logprobs:
        logprobs = completion_logprobs(choice.tokens, layout.new_offsets(place), explain=layout.explain)
        if scored:
            logprobs = joined(completion_logprobs(scored, layout.echo_offsets(place), explain=layout.explain), logprobs)
    assert choice.finish_reason is not None, "every choice ends with a finish_reason"
    shown: CompletionChoice = {
        "index": place * layout.n + choice.index,
        "text": echo + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if layout.has_token_ids:
        shown["token_ids"] = choice.token_ids
    if answer.prompt is not None and layout.has_token_ids:
        shown["prompt_token_ids"] = list(answer.prompt.token_ids)
    if answer.prompt is not None and layout.has_prompt_logprobs:
        shown["prompt_logprobs"] = prompt_logprobs(answer.prompt)
    return shown


def joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    """The lists of `first`, with those of `then` behind them."""
    both: CompletionLogprobs = {
        "tokens": first["tokens"] + then["tokens"],
        "token_logprobs": first["token_logprobs"] + then["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + then["top_logprobs"],
        "text_offset": first["text_offset"] + then["text_offset"],
    }
    if "content" in first and "content" in then:
        both["content"] = first["content"] + then["content"]
    return both


class CompletionWriter:
    """The chunks of a completion. An echo is the first chunk of each choice."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._begun: set[int] = set()  # prompts
        self._offsets: dict[int, TextOffsets] = {}  # of each choice

    def parts(self, place: int, event: PromptScored | Delta) -> Iterator[Part]:
        if place not in self._begun:
            self._begun.add(place)
            yield from self._prompt_parts(place, event if isinstance(event, PromptScored) else None)
        if isinstance(event, Delta) and (event.text or event.finish_reason or self._shows_tokens(event)):
            yield self._delta_part(place, event)

    def _prompt_parts(self, place: int, prompt: PromptScored | None) -> Iterator[Part]:
        layout = self._layout
        if not layout.has_echo and not layout.has_token_ids:
            return
        text = layout.texts[place] if layout.has_echo else ""
        for index in range(place * layout.n, (place + 1) * layout.n):
            logprobs = None
            if layout.has_echo and layout.has_logprobs and prompt is not None and prompt.tokens:
                logprobs = completion_logprobs(prompt.tokens, layout.echo_offsets(place), explain=layout.explain)
            part = _chunk(index, text, logprobs)
            if layout.has_token_ids and prompt is not None:
                part["choices"][0]["prompt_token_ids"] = prompt.token_ids
            yield part

    def _delta_part(self, place: int, event: Delta) -> Part:
        index = place * self._layout.n + event.index
        logprobs = None
        if self._layout.has_logprobs and event.tokens:
            offsets = self._offsets.setdefault(index, self._layout.new_offsets(place))
            logprobs = completion_logprobs(event.tokens, offsets, explain=self._layout.explain)
        part = _chunk(index, event.text, logprobs)
        choice = part["choices"][0]
        if event.finish_reason:
            choice |= {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
        if self._layout.has_token_ids:
            choice["token_ids"] = event.token_ids
        return part

    def _shows_tokens(self, event: Delta) -> bool:
        layout = self._layout
        return bool((layout.has_logprobs and event.tokens) or (layout.has_token_ids and event.token_ids))


def _chunk(index: int, text: str, logprobs: object) -> Part:
    return {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}]}
