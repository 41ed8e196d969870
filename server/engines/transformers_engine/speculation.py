"""What choices read ahead in a step: drafts from their texts, and what a member writes ahead.

Chances are those that each choice's own drafts had so far (`text_drafts`, `member_drafts`), seconds those of the
forwards that were run (`step_costs`); `draft_lengths` weighs them. Both are estimates and concern speed alone: what is
drawn is the same whatever is read ahead (`choice`). Where drafts are wrong chances fall, and nothing is drafted. The
rule is that of Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024.

A member that drafts writes within the step, for all choices side by side, before the others read. So between steps no
member lags behind another, and nothing else need know of drafts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.choice import Draft, LiveChoice
from ensemble_server.server.engines.transformers_engine.draft_lengths import Outlook, TextDraft, Writer
from ensemble_server.server.engines.transformers_engine.kv_budget import LOOKAHEAD
from ensemble_server.server.engines.transformers_engine.lagging_members import lagging
from ensemble_server.server.engines.transformers_engine.member_drafts import Manuscript, drafter_of
from ensemble_server.server.engines.transformers_engine.scheduler import Work
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts

MAX_FROM_TEXT = LOOKAHEAD - 1  # tokens; with the last one they fill the 16 rows that linear layers are packed for
MAX_WRITTEN = 7  # by a member, each with a forward of its own

Forward = Callable[[Sequence[Work]], Sequence[Sequence[torch.Tensor]]]  # -> per work and span: (num_keep, V)


class Speculation:
    """`members_write`: whether members write ahead, too, where no rule of their mixture has them do so. Belongs to the
    engine's thread, but for `observe`, which is called on that of the backbone's device."""

    def __init__(self, *, members_write: bool) -> None:
        self.is_in_use = False  # until the first choice that could read ahead
        self._members_write = members_write
        self._costs: dict[Backbone, StepCosts] = {}
        self._num_drafted: Counter[str] = Counter()
        self._num_accepted: Counter[str] = Counter()

    def observe(self, backbone: Backbone, num_tokens: int, duration_s: float) -> None:
        """A forward took so long."""
        self._costs_of(backbone).observe(num_tokens, duration_s)

    def count(self, choice: LiveChoice, draft: Draft, num_right: int) -> None:
        """Of what `choice` has drafted, the first `num_right` tokens were right."""
        if draft.drafter is None:
            choice.trust.rest()
        else:
            choice.trust.observe(len(draft.token_ids), num_right)
        if draft.token_ids:
            source = "text" if draft.drafter is None else "member"
            self._num_drafted[source] += len(draft.token_ids)
            self._num_accepted[source] += num_right

    def drain_counts(self) -> tuple[Counter[str], Counter[str]]:
        """Tokens drafted and accepted since this was asked last."""
        counts = self._num_drafted, self._num_accepted
        self._num_drafted, self._num_accepted = Counter(), Counter()
        return counts

    def drafted(self, work: Sequence[Work], num_spare: float, forward: Forward) -> Sequence[Work]:
        """`work` with the drafts that are worth their time. `num_spare`: how many tokens (over all members) background
        work may have more. `forward`: runs the members that write."""
        choices = {i: item.choice for i, item in enumerate(work) if isinstance(item.choice, LiveChoice)}
        texts = [
            TextDraft(i, draft, choice.text_drafts.chances(len(draft)))
            for i, choice in choices.items()
            if choice.text_drafts is not None and (draft := choice.from_text(MAX_FROM_TEXT))
        ]
        writers = [
            Writer(i, drafter, choice.trust.chance, choice.max_draft)
            for i, choice in choices.items()
            if choice.max_draft and (drafter := self._drafter_of(choice)) is not None
        ]
        if not texts and not writers:
            return work
        self.is_in_use = True
        plan = Outlook(work, self._costs_of, num_spare).best(texts, writers, MAX_WRITTEN)
        drafts = {text.index: Draft(text.token_ids[:length]) for text, length in plan.texts if length}
        manuscripts = {
            writer.index: Manuscript(choices[writer.index], writer.drafter, writer.length(plan.length))
            for writer in plan.writers
        }
        while writing := {i: manuscript for i, manuscript in manuscripts.items() if not manuscript.is_done}:
            steps = [replace(work[i], spans=[manuscript.next_span()]) for i, manuscript in writing.items()]
            for manuscript, (rows,) in zip(writing.values(), forward(steps), strict=True):
                manuscript.take(rows[-1])
        drafts |= {i: manuscript.draft for i, manuscript in manuscripts.items()}
        return [
            replace(item, spans=choices[i].next_spans(drafts[i]), draft=drafts[i]) if i in drafts else item
            for i, item in enumerate(work)
        ]

    def _drafter_of(self, choice: LiveChoice) -> int | None:
        """Who may write ahead. By the rule of disagreement the main member does, whatever the config says of drafts."""
        if choice.lagging is not None:
            return None
        if choice.when is not None:
            return choice.main if lagging(choice.members, choice.main) else None
        return drafter_of(choice.members, choice.weights) if self._members_write else None

    def _costs_of(self, backbone: Backbone) -> StepCosts:
        return self._costs.setdefault(backbone, StepCosts())
