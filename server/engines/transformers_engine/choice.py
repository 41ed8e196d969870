"""One choice of one request while it is being generated: from a pooled distribution to the next piece of text."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import Delta, FinishReason, GenerationRequest, Mixture, Sampling, TokenLogprob
from ensemble_server.ensembles.pooling import posterior, sampling
from ensemble_server.server.engines.shared.grammar import GrammarMask
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prompt import Prompt
from ensemble_server.server.engines.transformers_engine.token_report import describe, explained
from ensemble_server.server.weights.tokenizer import TextStream
from ensemble_server.server.weights.view import StopStrings


class LiveChoice:
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
    ) -> None:
        self.index = index
        self.members: Sequence[Member] = prompt.members
        self.caches = caches
        self.mixture = mixture
        self.weights = prompt.weights  # (K,), of the next token
        self.last_token: int | None = None
        self.num_generated = 0
        self.finish_reason: FinishReason | None = None
        self._prior = prompt.prior
        self._request = request
        self._sampling: Sampling = request.sampling
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._grammar = grammar
        surface = self.members[0].surface
        self._surface = surface
        self._stream = TextStream(surface, skip_special_tokens=self._sampling.skip_special_tokens)
        self._stops = StopStrings(self._sampling.stop, include=self._sampling.include_stop_str_in_output)
        self._prompt_ids = torch.tensor(prompt.token_ids[0], dtype=torch.long)
        self._counts: Counter[int] = Counter()
        self._generator = generator(self._sampling.seed, index)

    def advance(self, pooled: torch.Tensor, member_logprobs: Sequence[torch.Tensor]) -> Delta:
        """Choose the next token from `pooled` (V,), learn from it, and return what the client sees of it.

        member_logprobs: per member (V,), the distributions that were pooled.
        """
        token_id = sampling.choose(self._controlled(pooled), self._sampling, self._generator)
        report = self._report(token_id, pooled, member_logprobs)
        if self.mixture.pool == "posterior" and len(self.members) > 1:
            evidence = [float(row[token_id]) for row in member_logprobs]
            self.weights = posterior.update(self.weights, evidence, self._prior, self.mixture.share)
        if self._grammar is not None:
            self._grammar.advance(token_id)
        self.num_generated += 1
        self.last_token = token_id
        self._counts[token_id] += 1
        return self._delta(token_id, report)

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        return self._finished("length", "deadline")

    def _controlled(self, pooled: torch.Tensor) -> torch.Tensor:
        logits = sampling.penalise(pooled, self._sampling, self._prompt_ids, self._counts)
        forbidden = []
        if self.num_generated < self._sampling.min_tokens:
            forbidden = [i for i in (*self._eos_ids, *self._sampling.stop_token_ids) if i < len(logits)]
        if self._grammar is not None:
            logits = logits.masked_fill(~self._grammar.allowed().to(logits.device), -torch.inf)
        if forbidden:
            logits = logits.clone() if logits is pooled else logits
            logits[forbidden] = -torch.inf
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
        return explained(token, pooled, names, member_logprobs, self.weights)

    def _delta(self, token_id: int, report: TokenLogprob | None) -> Delta:
        """Text and end of the choice after `token_id`. A token that ends the choice is not part of its text."""
        if token_id in self._eos_ids and not self._sampling.ignore_eos:
            return self._finished("stop", None)
        if token_id in self._sampling.stop_token_ids:
            return self._finished("stop", token_id)
        tokens = (report,) if report else ()
        text, stop = self._stream.add(token_id), None
        if self.num_generated >= self._sampling.min_tokens:
            text, stop = self._stops.add(text)
        if stop is not None:
            self.finish_reason = "stop"
            return Delta(self.index, text, (token_id,), tokens, finish_reason="stop", stop_reason=stop)
        if self._grammar is not None and self._grammar.is_finished:
            return self._finished("stop", None, text, token_id, tokens)
        if self.num_generated >= self._max_new_tokens:
            return self._finished("length", None, text, token_id, tokens)
        return Delta(self.index, text, (token_id,), tokens)

    def _finished(
        self,
        finish_reason: FinishReason,
        stop_reason: str | int | None,
        text: str = "",
        token_id: int | None = None,
        tokens: tuple[TokenLogprob, ...] = (),
    ) -> Delta:
        self.finish_reason = finish_reason
        tail, stop = self._stops.add(self._stream.flush())
        text += tail if stop is not None else tail + self._stops.flush()
        ids = () if token_id is None else (token_id,)
        return Delta(self.index, text, ids, tokens, finish_reason=finish_reason, stop_reason=stop_reason)


def generator(seed: int | None, index: int) -> torch.Generator:
    """Random numbers of choice `index`: equal for equal (seed, index), unrelated between choices."""
    entropy = secrets.randbits(64) if seed is None else seed % 2**64
    state = np.random.SeedSequence([entropy, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
