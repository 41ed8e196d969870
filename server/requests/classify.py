"""/v1/classify: which of a few labels continues a prompt, with a probability for each.

    {"model": "mix", "prompt": "Review: …\\nSentiment:", "labels": ["good", "bad"]}
    -> {"label": "good", "probabilities": {"good": 0.81, "bad": 0.19}, "members": {}, …}

A hosted model or probability average scores the labels under its own next-token distributions; of an ensemble of texts
the hosted members do, and their probabilities are averaged with the ensemble's weights. Nothing is drawn, so there is
no seed.

The maths is in `ensembles.label_probabilities`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.base import GenerationRequest, Sampling, Usage
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.ensembles.fan_out import total_usage
from ensemble_server.ensembles.label_probabilities import averaged, label_probabilities, likeliest
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.overrides import check_overrides
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.ensembles.routing import Routing
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.requests.classify_body import ClassifyBody, Prompted
from ensemble_server.server.requests.generation import NOBODY, Observer, whole
from ensemble_server.server.requests.label_logprobs import label_logprobs, place_labels
from ensemble_server.server.requests.models import requested_model
from ensemble_server.server.requests.responses import ClassificationObject
from ensemble_server.server.requests.terms import Terms

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

    def shown(self) -> ClassificationObject:
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
    hosting: Hosting, body: ClassifyBody, terms: Terms, priors: Priors, observer: Observer = NOBODY
) -> Classification:
    """The labels' probabilities for one body. Raises `RequestError` if it cannot be, `DeadlineError` if it is too late.

    `priors`: what is known already of content-free prompts. Each is read once for all bodies that share it, so its
    tokens are not part of any body's usage.
    """
    name = requested_model(hosting, body.model).name
    base = GenerationRequest(
        prompt="",
        priority=terms.priority,
        deadline_s=terms.deadline_s,
        request_id=terms.request_id,
        sampling=_SCORING,
    )
    with whole(observer, name) as used:
        classified = await _classified(hosting, name, body, body.ensemble, base, priors)
        used(classified.usage)
        return classified


_SCORING = Sampling(max_tokens=0, temperature=0.0)


async def _classified(
    hosting: Hosting,
    name: str,
    body: ClassifyBody,
    overrides: Mapping[str, Any],
    base: GenerationRequest,
    priors: Priors,
) -> Classification:
    entry = hosting.config.models[name]
    if isinstance(entry, MethodConfig) and not isinstance(entry, ProbabilityAverage.Config):
        return await _averaged_members(hosting, name, body, overrides, base, priors)
    if isinstance(entry, RemoteModel):
        raise UnsupportedError(
            f"model {name!r} is remote: it gives texts, and classify needs log-probabilities of given labels; classify "
            'with hosted models, and leave it out of an ensemble by {"ensemble": {"weights": {...}}}',
            param="model",
        )
    prior = None
    if (free := body.content_free) is not None:

        async def ask() -> dict[str, float]:
            # Without the deadline of the body that happens to come first: all others wait for it too.
            request = replace(base, deadline_s=None, request_id="")
            return (await _probabilities(hosting, name, body, free, overrides, request, None))[0]

        asked = body.model_dump_json(include={"content_free", "labels", "separator", "normalise"})
        prior = await priors.get(f"{name} {sorted(overrides.items())} {asked}", ask)
    probabilities, usage = await _probabilities(hosting, name, body, body, overrides, base, prior)
    return Classification(name, probabilities, usage=usage)


async def _averaged_members(
    hosting: Hosting,
    name: str,
    body: ClassifyBody,
    overrides: Mapping[str, Any],
    base: GenerationRequest,
    priors: Priors,
) -> Classification:
    """One member after the other: other rows keep the engine busy, and the members of this one share its prompt."""
    entry = hosting.config.models[name]
    if isinstance(entry, Routing.Config):
        raise UnsupportedError(
            f"model {name!r} (routing) has no weights of its own to average by; classify with one of its members, or "
            "with a crowd_vote or probability_average of them",
            param="model",
        )
    assert isinstance(entry, MethodConfig), "it has members"
    check_overrides(overrides, ("weights",), entry.members)
    weights = {member: weight for member, weight in overrides.get("weights", entry.members).items() if weight}
    if not weights or min(weights.values()) < 0:
        raise RequestError(
            "ensemble.weights: probabilities are averaged by weights of which none is negative and one above zero",
            param="ensemble.weights",
        )
    found = {member: await _classified(hosting, member, body, {}, base, priors) for member in weights}
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


class Priors:
    """The labels' probabilities after content-free prompts: each is asked for once, for all bodies that share it.

    `MAX_PRIORS` of them are kept, the oldest go first.
    """

    def __init__(self) -> None:
        self._known: dict[str, asyncio.Task[dict[str, float]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(self, key: str, ask: Callable[[], Coroutine[Any, Any, dict[str, float]]]) -> dict[str, float]:
        """What `ask` returned for `key`, now or before. Errors are raised to all that wait, and not kept."""
        if key not in self._known:
            while len(self._known) >= MAX_PRIORS:
                self._known.pop(next(iter(self._known)))
            self._known[key] = asyncio.create_task(ask())
            self._known[key].add_done_callback(
                lambda task: self._known.pop(key, None) if task.cancelled() or task.exception() else None
            )
        return await asyncio.shield(self._known[key])
