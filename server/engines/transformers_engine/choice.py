"""One choice of one request while it is being generated: from a pooled distribution to the next piece of text.

Its members may read a draft behind the last token, in one forward. The choice then goes on token by token as without
one, each drawn from the pool with the random numbers that it would have had, and for as long as what it draws is what
was drafted it has the next distribution already. So drafts change when tokens come, and never which.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import Delta, FinishReason, GenerationRequest, Mixture, Sampling, TokenLogprob
from ensemble_server.ensembles.pooling import following, sampling
from ensemble_server.server.engines.shared.choice_text import ChoiceText, ends_of_text
from ensemble_server.server.engines.shared.grammar import GrammarMask
from ensemble_server.server.engines.shared.thoughts import thought_limit, thought_stream
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prompt import Prompt
from ensemble_server.server.engines.transformers_engine.text_drafts import TextDrafts
from ensemble_server.server.engines.transformers_engine.token_report import describe, explained


class LiveChoice:
    """`text_drafts`: what is drafted from, if anything; of this choice alone."""

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
        self.last_token: int | None = None
        self.text_drafts = text_drafts
        self._max_new_tokens = max_new_tokens
        self._prior = prompt.prior
        self._request = request
        self._sampling: Sampling = request.sampling
        self._ends = sorted(ends_of_text(self._sampling, eos_ids) | set(self._sampling.stop_token_ids))
        self._grammar = grammar
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
        self._prompt_ids = torch.tensor(prompt.token_ids[0], dtype=torch.long)
        self._counts: Counter[int] = Counter()
        self._generator = generator(self._sampling.seed, index)

    @property
    def num_generated(self) -> int:
        return self._text.num_generated

    @property
    def num_reasoning(self) -> int:
        return self._text.num_reasoning

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._text.finish_reason

    def next_spans(self, draft: Sequence[int] = ()) -> list[tuple[Member, Span]]:
        """Its last token and what may come behind it, for every member to read."""
        assert self.last_token is not None, "a choice begins with its first token"
        last = (self.last_token,)
        return [
            (member, Span(cache, (*member.surface.own_ids(last), *draft), 1 + len(draft), member.adapter))
            for member, cache in zip(self.members, self.caches, strict=True)
        ]

    def draft(self, max_tokens: int) -> list[int]:
        """What the text leads one to expect behind the last token: tokens that all members have, and no more than can
        come, less the one that is drawn behind them in any case."""
        if self.text_drafts is None:
            return []
        draft = self.text_drafts.draft(min(max_tokens, self._max_new_tokens - self.num_generated - 1))
        strangers = (i for i, token_id in enumerate(draft) if not all(m.has(token_id) for m in self.members))
        return draft[: next(strangers, None)]

    def unread(self, num_tokens: int) -> None:
        """The last `num_tokens` that its members have read were drafted wrongly."""
        for cache in self.caches if num_tokens else ():
            cache.truncate(cache.length - num_tokens)

    def advance(self, pooled: torch.Tensor, member_logprobs: Sequence[torch.Tensor]) -> Delta:
        """Choose the next token from `pooled` (V,), learn from it, and return what the client sees of it.

        member_logprobs: per member (V,), the distributions that were pooled.
        """
        forced = self._text.forced_token()
        token_id = (
            sampling.choose(self._controlled(pooled), self._sampling, self._generator) if forced is None else forced
        )
        report = self._report(token_id, pooled, member_logprobs)
        if self.mixture.pool == "posterior" and len(self.members) > 1 and forced is None:
            evidence = [float(row[token_id]) for row in member_logprobs]
            self._state = following.update(self._state, evidence, self._prior, self.mixture.share)
            self.weights = following.member_weights(self._state, self.mixture.share)
        if self._grammar is not None:
            self._grammar.advance(token_id)
        self.last_token = token_id
        self._counts[token_id] += 1
        if self.text_drafts is not None:
            self.text_drafts.add(token_id)
        return self._text.add(token_id, report, is_complete=self._grammar is not None and self._grammar.is_finished)

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        return self._text.expire()

    def _controlled(self, pooled: torch.Tensor) -> torch.Tensor:
        logits = sampling.penalise(pooled, self._sampling, self._prompt_ids, self._counts)
        forbidden = []
        if self.num_generated < self._sampling.min_tokens:
            forbidden = [token_id for token_id in self._ends if token_id < len(logits)]
        if self._grammar is not None:
            logits = logits.masked_fill(~self._grammar.allowed().to(logits.device), -torch.inf)
        if forbidden:
            others = logits.clone()
            others[forbidden] = -torch.inf
            if self._grammar is None or not others.isneginf().all():  # a text that is complete ends, however short
                return others
        return logits

    def _report(
        self, token_id: int, pooled: torch.Tensor, member_logprobs: Sequence[torch.Tensor]
    ) -> TokenLogprob | None:
        if self._request.top_logprobs is None and not self._request.explain:
            return None
        token = describe(self._surface, pooled, token_id, self._request.top_logprobs or 0, previous=self.last_token)
        if not self._request.explain:
            return token
        names = [member.name for member in self.members]
        tops = [
            describe(self._surface, row, token_id, self._request.explain_top, previous=self.last_token).top
            for row in member_logprobs
        ]
        return explained(token, pooled, names, member_logprobs, self.weights, tops)


def generator(seed: int | None, index: int) -> torch.Generator:
    """Random numbers of choice `index`: equal for equal (seed, index), unrelated between choices."""
    entropy = secrets.randbits(64) if seed is None else seed % 2**64
    state = np.random.SeedSequence([entropy, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
