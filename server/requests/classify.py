"""/v1/classify of a batch: which of a few labels continues a prompt, with a probability for each.

    {"model": "mix", "prompt": "Review: …\\nSentiment:", "labels": ["good", "bad"]}
    -> {"label": "good", "probabilities": {"good": 0.81, "bad": 0.19}, "members": {}, …}

A hosted model or probability average scores the labels under its own next-token distributions; of an ensemble of texts
the hosted members do, and their probabilities are averaged with the ensemble's weights. Nothing is drawn, so there is
no seed.

The maths is in `ensembles.label_probabilities`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ensemble_server.ensembles.base import GenerationRequest, Sampling, Usage
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.ensembles.fan_out import total_usage
from ensemble_server.ensembles.label_probabilities import averaged, label_probabilities, likeliest
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.overrides import check_overrides
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.ensembles.routing import Routing
from ensemble_server.server.api.models import requested_model
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.requests.classify_body import ClassifyBody, Prompted, parsed_body
from ensemble_server.server.requests.label_logprobs import label_logprobs, place_labels

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

MAX_PRIORS = 256  # content-free prompts whose probabilities are kept


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
    placed = await asyncio.to_thread(place_labels, surface, others, body, prompted)
    logprobs, usage = await label_logprobs(hosting, name, placed, replace(base, overrides=dict(overrides)))
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
