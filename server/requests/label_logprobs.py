"""log p(label | prompt) under one model that gives distributions.

A label is tokenised where it stands, after the prompt: the tokens that all labels and the prompt have in common at the
front are the condition, the rest is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import DistributionModel, GenerationRequest, Model, Usage, collect
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.ensembles.fan_out import total_usage
from ensemble_server.ensembles.label_probabilities import common_prefix_length
from ensemble_server.server.requests.classify_body import ClassifyBody, Prompted
from ensemble_server.server.requests.messages import template_messages

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

NUM_ALTERNATIVES = 64  # of one distribution that are read; labels of one token are nearly always among them


@dataclass(frozen=True)
class Placed:
    """Labels as token ids where they stand. `condition`: the tokens before all of them, at least one."""

    condition: tuple[int, ...]
    tails: Mapping[str, tuple[int, ...]]


def place_labels(surface: Surface, others: Sequence[Surface | None], body: ClassifyBody, prompted: Prompted) -> Placed:
    """Encodes the prompt alone and before each label. `others`: how each member sees text; one view for all is needed.

    subtle: the last tokens of the prompt may merge with the label's first ("New" + "York"), so the condition ends
    where the first sequence departs and may be shorter than the prompt.
    """
    raw = prompted.prompt if prompted.messages is None else None
    raw = prompted.input if prompted.messages is None and raw is None else raw
    if prompted.messages is not None:
        messages = template_messages(prompted.messages)
        text = surface.render_text(messages)
        if any(other is not None and other.render_text(messages) != text for other in others):
            raise UnsupportedError(
                "the members have different views of the conversation (system prompts, chat templates), so their "
                "distributions cannot be pooled over one prompt; send a raw prompt, or classify with a crowd_vote of "
                "them, which averages their probabilities",
                param="messages",
            )
        sequences = {
            label: surface.encode(text + (body.separator or "") + label, add_special_tokens=False)
            for label in body.labels
        }
        alone = surface.encode(text, add_special_tokens=False)
    elif isinstance(raw, str):
        sequences = {label: surface.encode(raw + _separator(body, raw, label) + label) for label in body.labels}
        alone = surface.encode(raw)
    else:
        alone = list(raw or ())
        sequences = {
            label: alone + surface.encode((body.separator or "") + label, add_special_tokens=False)
            for label in body.labels
        }
    length = common_prefix_length([alone, *sequences.values()])
    if not length:
        raise RequestError("there is no token of the prompt before the labels; nothing predicts them", param="prompt")
    for label, ids in sequences.items():
        if len(ids) == length:
            raise RequestError(f"labels: {label!r} adds no token to this prompt", param="labels")
    return Placed(tuple(alone[:length]), {label: tuple(ids[length:]) for label, ids in sequences.items()})


def _separator(body: ClassifyBody, prompt: str, label: str) -> str:
    if body.separator is not None:
        return body.separator
    return "" if not prompt or prompt[-1].isspace() or label[0].isspace() else " "


async def label_logprobs(
    hosting: Hosting, name: str, placed: Placed, base: GenerationRequest
) -> tuple[dict[str, float], Usage]:
    """log p(label | condition) of each label, in nats."""
    usages: list[Usage] = []
    if all(len(ids) == 1 for ids in placed.tails.values()) and not _is_over_bytes(hosting.models[name]):
        found, usage = await _from_one_distribution(hosting, name, placed, base)
        usages.append(usage)
        if len(found) == len(placed.tails):
            return found, usage
    logprobs: dict[str, float] = {}
    for label, ids in placed.tails.items():  # in turn: each finds what the one before read of the prompt
        request = replace(base, prompt=placed.condition + ids, prompt_logprobs=0)
        answer = await collect(hosting.models[name], request)
        assert answer.prompt is not None, "a hosted model says how it read the prompt"
        scored = answer.prompt.tokens[len(placed.condition) :]
        logprobs[label] = sum(token.logprob for token in scored if token.logprob is not None)
        usages.append(answer.done.usage)
    return logprobs, total_usage(usages)


def _is_over_bytes(model: Model) -> bool:
    """Whether its members share no tokens: labels are scored by their bytes."""
    return isinstance(model, DistributionModel) and model.host.averages_over(model.mixture) == "bytes"


async def _from_one_distribution(
    hosting: Hosting, name: str, placed: Placed, base: GenerationRequest
) -> tuple[dict[str, float], Usage]:
    """Labels of one token: those among the likeliest tokens after the condition, which is read once for all."""
    sampling = replace(base.sampling, max_tokens=1, ignore_eos=True)
    request = replace(base, prompt=placed.condition, sampling=sampling, top_logprobs=NUM_ALTERNATIVES)
    answer = await collect(hosting.models[name], request)
    top = answer.choices[0].tokens[0].top
    seen = {token.token_id: token.logprob for token in top if token.logprob is not None}
    logprobs = {label: seen[ids[0]] for label, ids in placed.tails.items() if ids[0] in seen}
    return logprobs, answer.done.usage
