"""One choice of one request while it is being generated: from a pooled distribution to the next piece of text.

Its members may read a draft behind the last token, in one forward. The choice then goes on token by token as without
one, each drawn from the pool with the random numbers that it would have had, and for as long as what it draws is what
was drafted it has the next distribution already. So drafts change when tokens come, and never which.

With selective averaging (`ensembles.pooling.selective`) tokens come from the main member alone or from the pool. By the
entropy rule members with weights of their own lag behind until they are asked (`lagging_members`); by the rule of
disagreement the main member drafts, and the others read what it wrote at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemble_server.ensembles.base import Delta, FinishReason, GenerationRequest, Mixture, Sampling, TokenLogprob
from ensemble_server.ensembles.pooling import following, gated, selective
from ensemble_server.server.engines.shared.choice_text import ChoiceText, ends_of_text
from ensemble_server.server.engines.shared.grammar import GrammarMask
from ensemble_server.server.engines.shared.thoughts import thought_limit, thought_stream
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.drawing import Drawing, generator
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.lagging_members import LaggingMembers, lagging
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prompt import Prompt
from ensemble_server.server.engines.transformers_engine.text_drafts import TextDrafts
from ensemble_server.server.engines.transformers_engine.token_report import describe, explained
from ensemble_server.server.engines.transformers_engine.trust import Trust


@dataclass(frozen=True)
class Draft:
    """What members read behind the last token of a choice.

    If member `drafter` wrote it: `rows` (V,) are what it expected behind the last token, behind the first of the draft,
    and so on, for as far as it has read, `num_read` tokens in all.
    """

    token_ids: Sequence[int] = ()
    drafter: int | None = None
    rows: Sequence[torch.Tensor] = ()
    num_read: int = 0

    @property
    def unread(self) -> Sequence[int]:
        """Of it, what the drafter has not read."""
        return self.token_ids[max(0, len(self.rows) - 1) :]


NOTHING = Draft()


class LiveChoice:
    """`text_drafts`: what is drafted from, if anything; of this choice alone. `trust`: in what members write ahead.
    `lagging`: members that read late, if any. `num_joint`: tokens that came from the pool, with selective averaging.
    `drawn_weights`: (K,), those with which its tokens were drawn, added up."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        mixture: Mixture,
        prompt: Prompt,
        caches: Sequence[RowCache],
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        grammar: GrammarMask | None,
        text_drafts: TextDrafts | None = None,
    ) -> None:
        self.index = index
        self.members: Sequence[Member] = prompt.members
        self.caches = caches
        self.mixture = mixture
        self.weights = prompt.weights  # (K,), of the next token
        self._state = prompt.state
        self._trail = prompt.trail
        self._pooled_with = prompt.weights  # (K,), what the token was drawn with: with a gate it knows more
        self.drawn_weights = np.zeros(len(prompt.weights))
        self.last_token: int | None = None
        self.when = mixture.when if len(self.members) > 1 else None
        self.main = list(mixture.weights).index(mixture.main)
        self.num_joint = 0
        self.lagging: LaggingMembers | None = None
        if self.when is not None and self.when.entropy is not None and lagging(self.members, self.main):
            self.lagging = LaggingMembers(self.members, caches, self.main, is_judged=mixture.pool == "posterior")
            text_drafts = None  # nobody would have read the place where the others are asked
        self.text_drafts = text_drafts
        self.trust = Trust()
        self._max_new_tokens = max_new_tokens
        self._prior = prompt.prior
        self._request = request
        self._sampling: Sampling = request.sampling
        self.ends = ends_of_text(self._sampling, eos_ids) | set(self._sampling.stop_token_ids)
        self._surface = self.members[0].surface
        self._text = ChoiceText(
            index,
            self._sampling,
            self._surface,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            thoughts=thought_stream(request, self._surface, prompt.token_ids[0]),
            thought_limit=thought_limit(request, self._surface),
        )
        self.drawing = Drawing(
            self._sampling, prompt.token_ids[0], sorted(self.ends), grammar, generator(self._sampling.seed, index)
        )

    @property
    def num_generated(self) -> int:
        return self._text.num_generated

    @property
    def num_reasoning(self) -> int:
        return self._text.num_reasoning

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._text.finish_reason

    def next_spans(self, draft: Draft = NOTHING) -> list[tuple[Member, Span]]:
        """Its last token and what may come behind it, for every member to read that has not done so. Those that lag
        come last, if they have to read on."""
        spans = []
        for k, (member, cache) in enumerate(zip(self.members, self.caches, strict=True)):
            if self.lagging is not None and k in self.lagging.indices:
                continue
            last, drafted = (self.last_ids(member), draft.token_ids) if k != draft.drafter else ([], draft.unread)
            if token_ids := [*last, *drafted]:
                spans.append((member, Span(cache, token_ids, len(drafted) + bool(last), member.adapter)))
        if self.lagging is not None and self.lagging.is_due:
            spans += self.lagging.next_spans()
        return spans

    @property
    def num_next(self) -> list[int]:
        """How many tokens each member reads next, at most, without drafts."""
        if self.lagging is None:
            return [1] * len(self.members)
        return [self.lagging.num_unread if k in self.lagging.indices else 1 for k in range(len(self.members))]

    def late_spans(self, read: Sequence[torch.Tensor]) -> list[tuple[Member, Span]]:
        """What those that lag have to read, if by what the others expect they are asked. read: what came of
        `next_spans()`."""
        if self.when is None or self.lagging is None or self.lagging.is_due:
            return []
        place = sum(k not in self.lagging.indices for k in range(self.main))
        return self.lagging.next_spans() if selective.is_unsure(self.when, read[place][-1]) else []

    def last_ids(self, member: Member) -> list[int]:
        """Its last token, as `member` reads it."""
        assert self.last_token is not None, "a choice begins with its first token"
        return member.surface.own_ids((self.last_token,))

    def distributions(self, draft: Draft, read: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor | None]]:
        """Per member what it expects behind the last token, behind the first of the draft, ...: (V,) each; None of one
        that has not read so far.

        read: what came of `next_spans(draft)`, and behind it of `late_spans`.
        """
        results = iter(read)
        if self.lagging is not None:
            expected: dict[int, torch.Tensor] = {}
            for k in range(len(self.members)):
                if k not in self.lagging.indices:
                    expected[k] = next(results)[-1]
            if late := list(results):
                for evidence in self.lagging.take(late):
                    self._follow(evidence)
                expected |= {k: rows[-1] for k, rows in zip(self.lagging.indices, late, strict=True)}
            return [[expected.get(k)] for k in range(len(self.members))]
        return [
            [*draft.rows, *(next(results) if draft.unread else ())] if k == draft.drafter else [*next(results)]
            for k in range(len(self.members))
        ]

    @property
    def max_draft(self) -> int:
        """How many tokens can come, less the one that is drawn behind a draft in any case."""
        return self._max_new_tokens - self.num_generated - 1

    def can_draft(self, token_id: int) -> bool:
        """Whether all members have that token."""
        return all(member.has(token_id) for member in self.members)

    def from_text(self, max_tokens: int) -> list[int]:
        """What the text leads one to expect behind the last token."""
        if self.text_drafts is None:
            return []
        draft = self.text_drafts.draft(min(max_tokens, self.max_draft))
        return draft[: next((i for i, token_id in enumerate(draft) if not self.can_draft(token_id)), None)]

    def unread(self, num_tokens: int) -> None:
        """The last `num_tokens` that its members have read were drafted wrongly."""
        for cache in self.caches if num_tokens else ():
            cache.truncate(cache.length - num_tokens)

    def voters(self, expected: Sequence[torch.Tensor | None]) -> list[int]:
        """The members whose distributions are to be pooled for the next token. expected: per member (V,), or None."""
        everyone = list(range(len(self.members)))
        main = expected[self.main]
        if self.when is None or main is None:
            return everyone
        has_all = all(row is not None for row in expected)
        return everyone if has_all and selective.is_unsure(self.when, main) else [self.main]

    def pool_weights(self, rows: Sequence[torch.Tensor]) -> np.ndarray:
        """(K,), with which the next token's distribution is pooled. rows: per member (V,), what it expects there."""
        self._pooled_with = self.weights
        if self.mixture.gate is not None and len(rows) > 1:
            views = gated.views(torch.stack([row.to(rows[0].device) for row in rows])[:, None])
            seen = gated.Situation(
                views, self.weights[:, None], self._trail.sums[..., None], np.array([self._trail.num_tokens])
            )
            self._pooled_with = gated.weights(self.mixture.gate, seen)[:, 0]
        return self._pooled_with

    def advance(
        self, pooled: torch.Tensor, expected: Sequence[torch.Tensor | None], voters: Sequence[int] | None = None
    ) -> Delta:
        """Choose the next token from `pooled` (V,), learn from it, and return what the client sees of it.

        expected: per member (V,), or None of one that has not read so far. voters: those whose distributions were
        pooled, with `pool_weights`; all by default.
        """
        voters = range(len(self.members)) if voters is None else voters
        main = expected[self.main]
        if self.when is None or main is None or len(voters) == 1:
            is_joint = False
        elif not (is_joint := bool(selective.is_pooled(self.when, main.to(pooled.device), pooled))):
            pooled, voters = main, [self.main]
        forced = self._text.forced_token()
        token_id = self.drawing.draw(pooled) if forced is None else forced
        self.num_joint += is_joint and forced is None
        self.drawn_weights += self._pooled_with
        report = self._report(token_id, pooled, expected, voters)
        self._learn(token_id, expected, is_drawn=forced is None)
        self.drawing.take(token_id)
        self.last_token = token_id
        if self.text_drafts is not None:
            self.text_drafts.add(token_id)
        return self._text.add(token_id, report, is_complete=self.drawing.is_complete)

    def _learn(self, token_id: int, expected: Sequence[torch.Tensor | None], *, is_drawn: bool) -> None:
        """Move the weights along a token that was drawn, once all members have said what they gave it."""
        said = None
        if self.mixture.pool == "posterior" and len(self.members) > 1 and is_drawn:
            said = np.array([np.nan if row is None else float(row[token_id]) for row in expected])
            if not np.isnan(said).any():
                self._follow(said)
                said = None
        if self.lagging is not None:
            self.lagging.add(token_id, said)

    def _follow(self, evidence: np.ndarray) -> None:
        """evidence: (K,) nats that members gave a token."""
        self._state = following.update(self._state, evidence, self._prior, self.mixture.share)
        self.weights = following.member_weights(self._state, self.mixture.share)
        if self.mixture.gate is not None:
            *_, self._trail = gated.follow(self._trail, evidence[:, None])

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        return self._text.expire()

    def _report(
        self,
        token_id: int,
        pooled: torch.Tensor,
        expected: Sequence[torch.Tensor | None],
        voters: Sequence[int],
    ) -> TokenLogprob | None:
        if self._request.top_logprobs is None and not self._request.explain:
            return None
        token = describe(self._surface, pooled, token_id, self._request.top_logprobs or 0, previous=self.last_token)
        if not self._request.explain:
            return token
        names = [self.members[k].name for k in voters]
        rows = [row for k in voters if (row := expected[k]) is not None]
        tops = [
            describe(self._surface, row, token_id, self._request.explain_top, previous=self.last_token).top
            for row in rows
        ]
        weights = self._pooled_with if len(voters) == len(self.members) else np.ones(1)
        return explained(token, pooled, names, rows, weights, tops)
