"""/v1/classify of a batch: which of a few labels continues a prompt, with a probability for each.

    {"model": "mix", "prompt": "Review: …\\nSentiment:", "labels": ["good", "bad"]}
    -> {"label": "good", "probabilities": {"good": 0.81, "bad": 0.19}, "members": {}, …}

A hosted model or probability average scores the labels under its own next-token distributions; of an ensemble of texts
the hosted members do, and their probabilities are averaged with the ensemble's weights. Nothing is drawn, so there is
no seed. A label is tokenised where it stands, after the prompt: the tokens that all labels and the prompt have in
common at the front are the condition, the rest is scored.

The maths is in `ensembles.label_probabilities`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from ensembles.base import GenerationRequest, Sampling, Usage, collect
from ensembles.errors import RequestError, UnsupportedError
from ensembles.fan_out import total_usage
from ensembles.label_probabilities import Normalisation, averaged, common_prefix_length, label_probabilities, likeliest
from ensembles.method import MethodConfig
from ensembles.overrides import check_overrides
from ensembles.probability_averaging import ProbabilityAverage
from ensembles.routing import Routing
from server.api.messages import ChatMessage, Part, template_messages
from server.api.models import requested_model
from server.api.protocol import TokenId
from server.config import RemoteModel
from server.findings import nearest

if TYPE_CHECKING:
    from server.hosting import Hosting
    from server.surface import Surface

MAX_LABELS = 128
NUM_ALTERNATIVES = 64  # of one distribution that are read; labels of one token are nearly always among them
MAX_PRIORS = 256  # content-free prompts whose probabilities are kept

# --- the request --------------------------------------------------------------------------------------------------


def _distinct(labels: list[str]) -> list[str]:
    if len(set(labels)) < len(labels):
        raise ValueError("holds a label twice")
    if blank := [label for label in labels if not label.strip()]:
        raise ValueError(f"a label must not be blank, got {blank[0]!r}")
    return labels


Labels = Annotated[list[str], Field(min_length=2, max_length=MAX_LABELS), AfterValidator(_distinct)]
RawPrompt = str | Annotated[list[TokenId], Field(min_length=1)]


class Prompted(Part):
    """Exactly one of a chat and a raw prompt; `input` is another name for `prompt`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    prompt: RawPrompt | None = None
    input: RawPrompt | None = None

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Prompted:
        given = [name for name in ("messages", "prompt", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of messages, prompt and input, got {' and '.join(given) or 'none'}")
        return self


class ClassifyBody(Prompted):
    """`separator` stands between prompt and label; by default a space after raw text that does not end in white space
    and before a label that does not begin with one, and nothing after a chat. `content_free`: the same prompt with
    nothing to judge in it, whose probabilities are divided out."""

    model: str | None = None
    labels: Labels
    separator: str | None = None
    normalise: Normalisation = "sum"
    content_free: Prompted | None = None
    ensemble: dict[str, JsonValue] = Field(default_factory=dict)


def parsed_body(body: Mapping[str, Any]) -> ClassifyBody:
    """Raises `RequestValidationError`, as HTTP routes do, or `RequestError` for a key that is not known."""
    try:
        parsed = ClassifyBody.model_validate(dict(body))
    except ValidationError as exc:
        found = [{**finding, "loc": ("body", *finding["loc"])} for finding in exc.errors()]
        raise RequestValidationError(found, body=body) from exc
    for part, at in ((parsed, ""), (parsed.content_free, "content_free.")):
        for key in (part.model_extra or {}) if part is not None else ():
            known = list(type(part).model_fields)
            raise RequestError(f"unknown parameter {at + key!r}{nearest(key, known)}", param=at + key)
    return parsed


# --- the answer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classification:
    """`members`: of an ensemble of texts, the probabilities that each of its members gives. `usage`: of all models."""

    model: str
    probabilities: Mapping[str, float]
    members: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    @property
    def label(self) -> str:
        return likeliest(self.probabilities)

    def shown(self) -> dict[str, Any]:
        """JSON-ready, as it goes into a row's body."""
        return {
            "object": "classification",
            "model": self.model,
            "label": self.label,
            "probabilities": dict(self.probabilities),
            "members": {name: dict(given) for name, given in self.members.items()},
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "total_tokens": self.usage.total_tokens,
            },
        }


async def classify(
    hosting: Hosting,
    body: Mapping[str, Any],
    *,
    priority: int = 1,
    deadline_s: float | None = None,
    request_id: str = "",
) -> Classification:
    """The labels' probabilities for one body. Raises `RequestError` (and `RequestValidationError`) if it cannot be.

    `deadline_s`: seconds after which it raises `DeadlineError`. A content-free prompt is read once for all bodies that
    share it, so its tokens are not part of any body's usage.
    """
    parsed = parsed_body(body)
    name = requested_model(hosting, parsed.model).name
    base = GenerationRequest(
        prompt="", priority=priority, deadline_s=deadline_s, request_id=request_id, sampling=_SCORING
    )
    return await _classified(hosting, name, parsed, parsed.ensemble, base)


_SCORING = Sampling(max_tokens=0, temperature=0.0)


async def _classified(
    hosting: Hosting, name: str, body: ClassifyBody, overrides: Mapping[str, Any], base: GenerationRequest
) -> Classification:
    entry = hosting.config.models[name]
    if isinstance(entry, MethodConfig) and not isinstance(entry, ProbabilityAverage.Config):
        return await _averaged_members(hosting, name, body, overrides, base)
    if isinstance(entry, RemoteModel):
        raise UnsupportedError(
            f"model {name!r} is remote: it gives texts, and classify needs log-probabilities of given labels; classify "
            'with hosted models, and leave it out of an ensemble by {"ensemble": {"weights": {...}}}',
            param="model",
        )
    prior = None
    if body.content_free is not None:
        prior = await _prior(hosting, name, body, overrides, base)
    probabilities, usage = await _probabilities(hosting, name, body, body, overrides, base, prior)
    return Classification(name, probabilities, usage=usage)


async def _averaged_members(
    hosting: Hosting, name: str, body: ClassifyBody, overrides: Mapping[str, Any], base: GenerationRequest
) -> Classification:
    """One member after the other: other rows keep the engine busy, and the members of this one share its prompt."""
    entry = hosting.config.models[name]
    if isinstance(entry, Routing.Config):
        raise UnsupportedError(
            f"model {name!r} (routing) has no weights of its own to average by; classify with one of its members, or "
            "with a crowd_vote or probability_average of them",
            param="model",
        )
    check_overrides(overrides, ("weights",), entry.members)
    weights = {member: weight for member, weight in overrides.get("weights", entry.members).items() if weight}
    if not weights or min(weights.values()) < 0:
        raise RequestError(
            "ensemble.weights: probabilities are averaged by weights of which none is negative and one above zero",
            param="ensemble.weights",
        )
    found = {member: await _classified(hosting, member, body, {}, base) for member in weights}
    members = {member: one.probabilities for member, one in found.items()}
    usage = total_usage(one.usage for one in found.values())
    return Classification(name, averaged(members, weights), members, usage)


async def _probabilities(
    hosting: Hosting,
    name: str,
    body: ClassifyBody,
    prompted: Prompted,
    overrides: Mapping[str, Any],
    base: GenerationRequest,
    prior: Mapping[str, float] | None,
) -> tuple[dict[str, float], Usage]:
    """Of one model that gives distributions, for the prompt in `prompted`."""
    surface = hosting.surface(name)
    assert surface is not None, f"{name!r} is hosted or made of hosted members"
    others = [hosting.surface(member) for member in hosting.models[name].members]
    placed = await asyncio.to_thread(_placed, surface, others, body, prompted)
    logprobs, usage = await _logprobs(hosting, name, placed, replace(base, overrides=dict(overrides)))
    lengths = None
    if body.normalise == "tokens":
        lengths = {label: len(ids) for label, ids in placed.tails.items()}
    elif body.normalise == "bytes":
        lengths = {label: len(label.encode()) for label in placed.tails}
    return label_probabilities(logprobs, lengths=lengths, prior=prior), usage


# --- priors -------------------------------------------------------------------------------------------------------

_priors: WeakKeyDictionary[Hosting, dict[str, asyncio.Task[dict[str, float]]]] = WeakKeyDictionary()


async def _prior(
    hosting: Hosting, name: str, body: ClassifyBody, overrides: Mapping[str, Any], base: GenerationRequest
) -> dict[str, float]:
    """The labels' probabilities after the content-free prompt: asked once for all rows that share it."""
    known = _priors.setdefault(hosting, {})
    asked = body.model_dump_json(include={"content_free", "labels", "separator", "normalise"})
    key = f"{name} {sorted(overrides.items())} {asked}"

    async def ask() -> dict[str, float]:
        # Without the deadline of the row that happens to come first: all others wait for it too.
        request = replace(base, deadline_s=None, request_id="")
        return (await _probabilities(hosting, name, body, body.content_free, overrides, request, None))[0]

    if key not in known:
        while len(known) >= MAX_PRIORS:
            known.pop(next(iter(known)))
        known[key] = asyncio.create_task(ask())
        known[key].add_done_callback(
            lambda task: known.pop(key, None) if task.cancelled() or task.exception() else None
        )
    return await asyncio.shield(known[key])


# --- scoring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """Labels as token ids where they stand. `condition`: the tokens before all of them, at least one."""

    condition: tuple[int, ...]
    tails: Mapping[str, tuple[int, ...]]


def _placed(surface: Surface, others: Sequence[Surface | None], body: ClassifyBody, prompted: Prompted) -> Placed:
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


async def _logprobs(
    hosting: Hosting, name: str, placed: Placed, base: GenerationRequest
) -> tuple[dict[str, float], Usage]:
    """log p(label | condition) of each label, in nats."""
    usages: list[Usage] = []
    if all(len(ids) == 1 for ids in placed.tails.values()):
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


async def _from_one_distribution(
    hosting: Hosting, name: str, placed: Placed, base: GenerationRequest
) -> tuple[dict[str, float], Usage]:
    """Labels of one token: those among the likeliest tokens after the condition, which is read once for all."""
    sampling = replace(base.sampling, max_tokens=1, ignore_eos=True)
    request = replace(base, prompt=placed.condition, sampling=sampling, top_logprobs=NUM_ALTERNATIVES)
    answer = await collect(hosting.models[name], request)
    seen = {token.token_id: token.logprob for token in answer.choices[0].tokens[0].top}
    logprobs = {label: seen[ids[0]] for label, ids in placed.tails.items() if ids[0] in seen}
    return logprobs, answer.done.usage
