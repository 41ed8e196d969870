"""How far each choice reads ahead in a step: as far as that brings more tokens per second.

    as many drafted tokens, the likeliest first, as maximise    (choices + expected right ones) / seconds of the step

Expected from what each choice's own drafts were worth so far (`text_drafts`), seconds from the forwards that were run
(`step_costs`). Both are estimates and concern speed alone: what is drawn is the same whatever is read ahead
(`choice`). Where nothing repeats, chances fall and nothing is drafted; they are watched all the same, so that drafts
come back by themselves. The rule is that of Liu et al., "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput", 2024.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.choice import LiveChoice
from ensemble_server.server.engines.transformers_engine.scheduler import Work
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts

MAX_DRAFT = 15  # tokens; with the last one they fill the 16 rows that linear layers are packed for
TEXT = "text"  # where drafts come from


@dataclass(frozen=True)
class Draft:
    """What may come behind the last token of `work[index]`; `chances`: that the first, the first two, ... are right."""

    index: int
    token_ids: Sequence[int]
    chances: Sequence[float]


class Speculation:
    """Belongs to the engine's thread, but for `observe`, which is called on that of the backbone's device."""

    def __init__(self) -> None:
        self._costs: dict[Backbone, StepCosts] = {}
        self._num_drafted: Counter[str] = Counter()
        self._num_accepted: Counter[str] = Counter()

    def observe(self, backbone: Backbone, num_tokens: int, duration_s: float) -> None:
        """A forward took so long."""
        self._costs.setdefault(backbone, StepCosts()).observe(num_tokens, duration_s)

    def count(self, item: Work, num_accepted: int) -> None:
        """Of what `item` has drafted, `num_accepted` tokens were right."""
        if item.draft:
            self._num_drafted[TEXT] += len(item.draft)
            self._num_accepted[TEXT] += num_accepted

    def drain_counts(self) -> tuple[Counter[str], Counter[str]]:
        """Tokens drafted and accepted since this was asked last."""
        counts = self._num_drafted, self._num_accepted
        self._num_drafted, self._num_accepted = Counter(), Counter()
        return counts

    def drafted(self, work: Sequence[Work], num_spare: float) -> Sequence[Work]:
        """`work` with the drafts that are worth their time. `num_spare`: how many tokens (over all members) background
        work may have more."""
        drafts = []
        for index, item in enumerate(work):
            if isinstance(item.choice, LiveChoice) and (draft := item.choice.draft(MAX_DRAFT)):
                assert item.choice.text_drafts is not None, "it has drafted from its text"
                drafts.append(Draft(index, draft, item.choice.text_drafts.chances(len(draft))))
        if not drafts:
            return work
        drafted = list(work)
        for draft, length in zip(drafts, self._lengths(work, drafts, num_spare), strict=True):
            if length:
                item, tokens = work[draft.index], draft.token_ids[:length]
                assert isinstance(item.choice, LiveChoice), "only these draft"
                drafted[draft.index] = replace(item, spans=item.choice.next_spans(tokens), draft=tokens)
        return drafted

    def _lengths(self, work: Sequence[Work], drafts: Sequence[Draft], num_spare: float) -> list[int]:
        """How much of each draft is read. A prompt that is read in the same step delays it in any case: what drafts
        cost is compared with a step of choices alone."""
        backbones = list({member.backbone: None for item in work for member, _ in item.spans})
        column = {backbone: b for b, backbone in enumerate(backbones)}
        planned, of_choices = np.zeros(len(backbones)), np.zeros(len(backbones))
        widths = np.zeros((len(work), len(backbones)))  # what one token more of a choice is to each backbone
        for item, width in zip(work, widths, strict=True):
            for member, span in item.spans:
                planned[column[member.backbone]] += len(span.token_ids)
                width[column[member.backbone]] += 1
                if item.choice is not None:
                    of_choices[column[member.backbone]] += len(span.token_ids)

        chances = np.concatenate([draft.chances for draft in drafts])
        owners = np.repeat(np.arange(len(drafts)), [len(draft.chances) for draft in drafts])
        order = np.argsort(-chances, kind="stable")  # within a draft they fall, so that its beginning comes first
        width = widths[[draft.index for draft in drafts]][owners[order]]
        in_background = np.array([work[draft.index].job.priority > 0 for draft in drafts])[owners[order]]
        fits = ~in_background | ((width.sum(1) * in_background).cumsum() <= num_spare)
        order, width = order[fits], width[fits]

        num_tokens = planned + np.concatenate([np.zeros((1, len(backbones))), width.cumsum(0)])
        seconds = np.zeros(len(num_tokens))
        for b, backbone in enumerate(backbones):
            costs = self._costs.setdefault(backbone, StepCosts())
            before = costs.seconds(np.array([planned[b], of_choices[b]]))
            seconds += costs.seconds(num_tokens[:, b]) - before[0] + (before[1] if of_choices[b] else 0.0)
        num_choices = sum(item.choice is not None for item in work)
        expected = num_choices + np.concatenate([[0.0], chances[order].cumsum()])
        best = int(np.argmax(expected / seconds))
        return np.bincount(owners[order[:best]], minlength=len(drafts)).tolist()
