"""Each member's view of the tokens of items that flipped, taken while the arm is loaded and kept with its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import DistributionModel
from ensemble_server.ensembles.pooling import effective_weights, following
from ensemble_server.server.compare.analysis.flips import Flipped, flipped_items, view_inputs
from ensemble_server.server.compare.arms.candidates import ArmModel
from ensemble_server.server.compare.kept.records import View
from ensemble_server.server.compare.kept.results import TokenView
from ensemble_server.server.compare.measures.byte_scores import is_over_bytes
from ensemble_server.server.compare.running.work import Work

if TYPE_CHECKING:
    import torch

    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.weights.view import Surface

MAX_TOKENS = 96  # whose members are shown


async def collect_views(work: Work, hosting: Hosting, arm: ArmModel) -> None:
    """Note what the members of a mixture give the tokens of its flipped items. Other models have nothing to show."""
    model = hosting.models[arm.model]
    if not isinstance(model, DistributionModel) or len(model.mixture.weights) < 2 or arm.replicate is not None:
        return
    record = work.record(arm)
    baseline = work.records.get(work.plan.file.baseline)
    per_measure = work.plan.file.flips.per_arm
    for flipped in flipped_items(record, baseline, work.texts, work.tasks, per_measure=per_measure):
        inputs = view_inputs(record, flipped)
        known = record.views.get(flipped.key)
        if not flipped.continuation or (known is not None and known.inputs == inputs):
            continue
        record.views[flipped.key] = View(inputs=inputs, tokens=await _view(hosting, arm.model, model, flipped))
        work.records.save(record)


async def _view(hosting: Hosting, name: str, model: DistributionModel, flipped: Flipped) -> list[TokenView]:
    from ensemble_server.server.compare.measures.pooled_text import PooledText
    from ensemble_server.server.compare.measures.text_measure import mixture_logprobs

    surface = hosting.surface(name)
    assert surface is not None, "a mixture has hosted members"
    if is_over_bytes(model):
        return await _view_of_bytes(surface, model, flipped)
    prompt = flipped.prompt
    before = surface.encode(prompt) if isinstance(prompt, str) else surface.render(prompt)
    shown = surface.encode(flipped.continuation, add_special_tokens=False)[:MAX_TOKENS]
    ids = [*before, *shown]
    members = list(model.mixture.weights)
    parts: list[np.ndarray] = []
    mixture = model.mixture
    is_moved = mixture.when is not None or mixture.gate is not None
    whole = PooledText(mixture, {name: row for row, name in enumerate(members)}) if is_moved else None

    def visit(logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        if whole is not None:
            whole.take(logprobs, targets)
        parts.append(logprobs.gather(2, targets[None, :, None].expand(len(logprobs), -1, 1))[..., 0].double().numpy())

    await model.host.visit_logprobs(members, ids, visit)
    if not parts:
        return []
    of_members = np.concatenate(parts, axis=1)  # (K, T), the first token is not predicted
    if whole is not None:
        pooled = whole.logprobs
    else:
        pooled = None if mixture.pool == "geometric" else mixture_logprobs(mixture, of_members)
    prior = effective_weights(list(mixture.weights.values()))
    weights = np.broadcast_to(prior[:, None], of_members.shape)
    if whole is not None and mixture.gate is not None:
        weights = whole.weights
    elif mixture.pool == "posterior":
        weights, _ = following.track(following.start(prior, mixture.share), of_members, prior, mixture.share)
    return [
        TokenView(
            text=surface.decode([ids[place + 1]]),
            logprob=None if pooled is None else _finite(pooled[place]),
            members={member: _finite(of_members[row, place]) for row, member in enumerate(members)},
            weights={member: float(weights[row, place]) for row, member in enumerate(members)},
        )
        for place in range(max(len(before) - 1, 0), of_members.shape[1])
    ]


async def _view_of_bytes(surface: Surface, model: DistributionModel, flipped: Flipped) -> list[TokenView]:
    """Tokens of the first member, with what each member gave their bytes and its weight at the first of them."""
    from ensemble_server.server.compare.measures.byte_scores import score_bytes

    prompt = flipped.prompt
    ids = surface.encode(flipped.continuation, add_special_tokens=False)[:MAX_TOKENS]
    shown = surface.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")  # the last token may end inside a character
    if isinstance(prompt, str):
        scores = await score_bytes(model, prompt + shown)
    else:
        scores = await score_bytes(model, shown, after=prompt)
    at = scores.of_members.shape[1] - len(shown.encode())
    views: list[TokenView] = []
    for token_id in ids:
        part = slice(at, at + len(surface.bytes_of(token_id)))
        at = part.stop
        if part.start < 0 or part.stop > len(scores.logprobs):
            continue  # not every member can expect it, or it is cut
        views.append(
            TokenView(
                text=surface.decode([token_id]),
                logprob=_finite(scores.logprobs[part].sum()),
                members={
                    name: _finite(scores.of_members[k, part].sum()) for k, name in enumerate(model.mixture.weights)
                },
                weights={name: float(scores.weights[k, part.start]) for k, name in enumerate(model.mixture.weights)},
            )
        )
    return views


def _finite(logprob: float) -> float:
    """JSON has no infinity; a token that was ruled out shows as very unlikely."""
    return max(float(logprob), -1e4)
