"""Multiple choice by likelihood: the option that the model finds most probable after the prompt.

    score(option) = Σ log p(token | prompt, earlier tokens of the option)        over the option's tokens

`per_byte` divides by the option's UTF-8 bytes, so that long options are not at a disadvantage. Needs a model that gives
probabilities of a text that is given: a hosted member, a mixture of them, or a remote model whose entry names its
`tokenizer`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import DistributionModel, GenerationRequest, Message, Sampling, collect
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.compare.measures.byte_scores import is_over_bytes, score_bytes
from ensemble_server.server.compare.measures.remote_tokens import remote_surface
from ensemble_server.server.engines.remote.remote import RemoteChat

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface


async def option_logprobs(
    hosting: Hosting,
    model_name: str,
    prompt: str | tuple[Message, ...],
    options: tuple[str, ...],
    *,
    priority: int = 1,
) -> list[float]:
    """Nats of each option after `prompt`, raw text or messages.

    After raw text that does not end in white space an option is preceded by a blank. Members of different vocabularies
    may see the messages differently: what is scored are the option's bytes. Raises `UnsupportedError` if the model
    cannot score text, or if members of one vocabulary see the messages differently.
    """
    model = hosting.models[model_name]
    if isinstance(model, RemoteChat):
        return await _remote_logprobs(hosting, model, prompt, options)
    if not isinstance(model, DistributionModel):
        raise UnsupportedError(f"model {model_name!r} gives text, not probabilities of options")
    if is_over_bytes(model):
        return [await _byte_nats(model, prompt, option, priority) for option in options]
    members = list(model.mixture.weights)
    surface = _surface(hosting, members[0])
    if isinstance(prompt, str):
        context, sequences = _after_text(surface, prompt, options)
    else:
        views = [_surface(hosting, member).render(prompt) for member in members]
        if any(view != views[0] for view in views):
            raise UnsupportedError(
                f"the members of {model_name!r} have different views of the conversation (system prompts or chat "
                "templates), so no token sequence is common to them; ask with raw text"
            )
        context = views[0]
        sequences = [context + surface.encode(option, add_special_tokens=False) for option in options]

    async def nats(token_ids: list[int]) -> float:
        request = GenerationRequest(
            prompt=tuple(token_ids), prompt_logprobs=0, sampling=Sampling(max_tokens=0), priority=priority
        )
        answer = await collect(model, request)
        assert answer.prompt is not None, "a hosted model says how it read the prompt"
        scored = answer.prompt.tokens[_first_scored(context, token_ids) :]
        return sum(token.logprob for token in scored if token.logprob is not None)

    return [await nats(token_ids) for token_ids in sequences]


def _behind(prompt: str, option: str) -> str:
    return option if option[:1].isspace() or prompt[-1:].isspace() else f" {option}"


async def _byte_nats(model: DistributionModel, prompt: str | tuple[Message, ...], option: str, priority: int) -> float:
    """Of an option's bytes, under members of different vocabularies: each reads messages in its own rendering."""
    if isinstance(prompt, str):
        behind = _behind(prompt, option)
        scores = await score_bytes(model, prompt + behind, priority=priority)
        return float(scores.logprobs[-len(behind.encode()) :].sum())
    return float((await score_bytes(model, option, after=prompt, priority=priority)).logprobs.sum())


async def _remote_logprobs(
    hosting: Hosting, model: RemoteChat, prompt: str | tuple[Message, ...], options: tuple[str, ...]
) -> list[float]:
    surface = await asyncio.to_thread(remote_surface, hosting, model.name)
    if surface is None:
        raise UnsupportedError(
            f"model {model.name!r} gives text, not probabilities of options: its entry names no `tokenizer`"
        )
    if isinstance(prompt, str):
        context, sequences = _after_text(surface, prompt, options)
    else:
        context = surface.render(prompt)
        sequences = [context + surface.encode(option, add_special_tokens=False) for option in options]
    return [sum((await model.score(token_ids))[_first_scored(context, token_ids) - 1 :]) for token_ids in sequences]


def _after_text(surface: Surface, prompt: str, options: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt, and of the prompt with each option after it."""
    return surface.encode(prompt), [surface.encode(prompt + _behind(prompt, option)) for option in options]


def _first_scored(context: list[int], token_ids: list[int]) -> int:
    """The option's first letters may have joined the prompt's last token: score from where the two part."""
    same = next((i for i, (a, b) in enumerate(zip(context, token_ids, strict=False)) if a != b), len(context))
    return max(1, min(same, len(token_ids) - 1))


def _surface(hosting: Hosting, member: str) -> Surface:
    surface = hosting.surface(member)
    assert surface is not None, "members of a mixture are hosted"
    return surface
