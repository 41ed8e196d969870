"""A request in its members' terms, checked before any engine queues it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.ensembles.errors import ContextLengthError, UnsupportedError
from ensemble_server.server.engines.shared.stop_strings import check_stops
from ensemble_server.server.engines.shared.token_checks import check_ids, check_prompt
from ensemble_server.server.weights.view import Surface


class Reader(Protocol):
    """A member as far as what it reads is concerned. `vocab_size`: how many ids it has weights for."""

    @property
    def name(self) -> str: ...

    @property
    def surface(self) -> Surface: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Reading:
    """`prompts`: the token ids that each member reads, in the members' order. `max_new_tokens` 0: the prompt is only
    scored."""

    prompts: list[list[int]]
    max_new_tokens: int


class RequestReader:
    """One per engine: its members' tokenizers are used by one thread at a time. `always_writes`: whether the engine
    cannot read a prompt without writing a token behind it."""

    def __init__(self, *, always_writes: bool) -> None:
        self._always_writes = always_writes
        self.tokenizing = threading.Lock()  # fast tokenizers must not be reconfigured by two threads at once

    def read(self, request: GenerationRequest, members: Sequence[Reader], *, max_model_len: int) -> Reading:
        """Blocks while it tokenizes. Raises `RequestError` for an empty prompt, ids that no token has and stop strings
        that are too long, `ContextLengthError` for a prompt that leaves no room, `UnsupportedError` for scores of a
        prompt that members read differently.
        """
        check_stops(request.sampling.stop)
        with self.tokenizing:
            prompts = _prompts(request, members)
        if request.truncate_prompt_tokens is not None:
            prompts = [token_ids[-request.truncate_prompt_tokens :] for token_ids in prompts]
        field = "messages" if request.messages is not None else "prompt"
        for member, token_ids in zip(members, prompts, strict=True):
            check_prompt(token_ids, member.vocab_size, field)
        check_ids(request.sampling.logit_bias, members[0].vocab_size, "logit_bias")
        if request.prompt_logprobs is not None and any(token_ids != prompts[0] for token_ids in prompts):
            raise UnsupportedError(
                "prompt log-probabilities need one prompt for all members; these have different views of the "
                "conversation",
                param="prompt_logprobs",
            )
        longest, wanted = max(map(len, prompts)), request.sampling.max_tokens
        must_write = self._always_writes or (wanted != 0 and request.prompt_logprobs is None)
        if longest + must_write > max_model_len:
            raise ContextLengthError(
                f"the prompt has {longest} tokens; this model's context holds {max_model_len}, prompt and answer "
                "together",
                param=field,
            )
        room = max_model_len - longest
        return Reading(prompts, room if wanted is None else min(wanted, room))


def check_templates(members: Sequence[Reader]) -> None:
    """Raises `UnsupportedError` naming the first of several members that cannot read a conversation."""
    for member in members if len(members) > 1 else ():
        if member.surface.chat_template is None:
            raise UnsupportedError(
                f"member {member.name!r} has no chat template; use /v1/completions, set chat_template for it in the "
                "config, or leave it out by weights",
                param="messages",
            )


def _prompts(request: GenerationRequest, members: Sequence[Reader]) -> list[list[int]]:
    """Members with one view of text read it once."""
    if request.messages is None:
        raw = request.prompt
        token_ids = members[0].surface.encode(raw) if isinstance(raw, str) else list(raw or ())
        return [member.surface.own_ids(token_ids) for member in members]
    check_templates(members)
    views = [
        (
            id(member.surface.tokenizer),
            member.surface.chat_template,
            member.surface.system_prompt,
            repr(member.surface.template_kwargs),
        )
        for member in members
    ]
    read: dict[object, list[int]] = {}
    for view, member in zip(views, members, strict=True):
        if view not in read:
            read[view] = member.surface.render(
                request.messages, tools=request.tools, template_kwargs=request.told_template
            )
    return [read[view] for view in views]
