"""A request to members of different vocabularies: what of it is refused, and the prompt as each of them reads it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.engines.shared.reading import check_templates
from ensemble_server.server.engines.shared.stop_strings import check_stops
from ensemble_server.server.engines.shared.token_checks import check_ids, check_prompt
from ensemble_server.server.engines.transformers_engine.byte_generation import ByteView
from ensemble_server.server.engines.transformers_engine.byte_prompt import healed
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary
from ensemble_server.server.weights.view import Surface


def check_request(request: GenerationRequest) -> None:
    """Raise `UnsupportedError` naming the first thing that is about token ids, which these members do not share."""
    sampling = request.sampling
    check_stops(sampling.stop)
    asked = {
        "logit_bias": bool(sampling.logit_bias),
        "stop_token_ids": bool(sampling.stop_token_ids),
        "repetition_penalty": sampling.repetition_penalty != 1,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UnsupportedError(
                f"{name} is about token ids; the members of this model have different vocabularies and are averaged "
                "over text, so there are none that all share",
                param=name,
            )
    if request.prompt_logprobs is not None and request.messages is not None:
        raise UnsupportedError(
            "log-probabilities of the prompt need one text for all members; each of these has its own rendering of a "
            "conversation",
            param="prompt_logprobs",
        )


def byte_views(
    members: Sequence[Member], request: GenerationRequest, *, heals: bool, tokenizing: threading.Lock
) -> list[ByteView]:
    """The prompt in every member's tokens. `tokenizing` is held while tokenizers run.

    Raises `RequestError` for a prompt without tokens or one of token ids that stand for no text, `UnsupportedError` for
    a conversation that one of them cannot read.
    """
    if request.messages is not None:
        check_templates(members)
        return [_chat_view(member, request, tokenizing) for member in members]
    raw = request.prompt
    text = raw if isinstance(raw, str) else _text_of(members[0], raw or ())
    return [_raw_view(member, text, request, heals, tokenizing) for member in members]


def _chat_view(member: Member, request: GenerationRequest, tokenizing: threading.Lock) -> ByteView:
    surface = member.surface
    with tokenizing:
        ids = _kept(
            surface.render(request.messages or (), tools=request.tools, template_kwargs=request.told_template),
            request,
        )
    check_prompt(ids, member.vocab_size, "messages")

    def reread(answer: str) -> list[int]:
        with tokenizing:
            return [*ids, *surface.encode(answer, add_special_tokens=False)]

    return ByteView(ids, ids, b"", spelled_vocabulary(member), reread)


def _raw_view(
    member: Member, text: str, request: GenerationRequest, heals: bool, tokenizing: threading.Lock
) -> ByteView:
    surface, vocabulary = member.surface, spelled_vocabulary(member)
    with tokenizing:
        ids = _kept(surface.encode(text), request)
    check_prompt(ids, member.vocab_size, "prompt")
    data = text.encode(errors="replace")
    head, tail = healed(data, vocabulary.token_bytes, ids) if heals else (ids, b"")
    if request.prompt_logprobs is not None:
        check_spelled(member, ids, data)

    def reread(answer: str) -> list[int]:
        with tokenizing:
            return _kept(surface.encode(text + answer), request)

    return ByteView(ids, head, tail, vocabulary, reread)


def check_spelled(member: Member, token_ids: Sequence[int], text: bytes) -> None:
    """Raise `RequestError` unless these tokens of a member are `text`, byte for byte."""
    token_bytes = spelled_vocabulary(member).token_bytes
    if b"".join(token_bytes[token_id] for token_id in token_ids) != text:
        raise RequestError(
            f"member {member.name!r} does not read this text byte for byte (it has special tokens in it, or was cut), "
            "so it cannot be scored beside members of other vocabularies",
            param="prompt",
        )


def _kept(token_ids: list[int], request: GenerationRequest) -> list[int]:
    kept = request.truncate_prompt_tokens
    return token_ids if kept is None else token_ids[-kept:]


def _text_of(member: Member, token_ids: Sequence[int]) -> str:
    """The text that token ids of the surface stand for; other members read it in tokens of their own."""
    surface: Surface = member.surface
    check_ids(token_ids, member.vocab_size, "prompt")
    ids = list(token_ids)
    if ids and ids[0] == surface.tokenizer.bos_token_id:
        ids = ids[1:]
    for token_id in ids:
        if token_id in surface.special_ids:
            name = surface.tokenizer.convert_ids_to_tokens(token_id)
            raise RequestError(
                f"prompt: token {token_id} ({name!r}) stands for no text, and the members of this model, which have "
                "different vocabularies, share no such tokens; send messages, or a prompt of text",
                param="prompt",
            )
    return surface.decode(ids)
