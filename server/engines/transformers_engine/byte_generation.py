"""One request for text of members whose vocabularies differ, from the queue to its last event."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ensemble_server.ensembles.base import Done, GenerationRequest, Mixture, TokenLogprob
from ensemble_server.ensembles.pooling import effective_weights, following
from ensemble_server.server.engines.shared.grammar import CompiledGrammar
from ensemble_server.server.engines.shared.reading import Reading
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.byte_choice import ByteChoice, Reread
from ensemble_server.server.engines.transformers_engine.byte_prompt import BytePrompt, common_end
from ensemble_server.server.engines.transformers_engine.generation import Choice, Generation
from ensemble_server.server.engines.transformers_engine.given_alternatives import GivenAlternatives
from ensemble_server.server.engines.transformers_engine.given_reading import (
    GivenReading,
    MemberReading,
    begun,
    scored_pieces,
)
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare, answer_bytes
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey, PrefixCache
from ensemble_server.server.engines.transformers_engine.speller import Speller
from ensemble_server.server.weights.spelled_vocabulary import SpelledVocabulary

READ_PER_PIECE = 4  # tokens that a member may read for a token of the surface, as memory is counted


@dataclass(frozen=True)
class ByteView:
    """A prompt as one member reads it: `token_ids` of all of it, those of the `head` that is read as tokens, and the
    bytes of the `tail` that its lattice is given."""

    token_ids: list[int]
    head: list[int]
    tail: bytes
    vocabulary: SpelledVocabulary
    reread: Reread


class ByteGeneration(Generation):
    prompt: BytePrompt

    def __init__(
        self,
        request: GenerationRequest,
        mixture: Mixture,
        members: Sequence[Member],
        views: Sequence[ByteView],
        *,
        method: str,
        max_new_tokens: int,
        grammar: CompiledGrammar | None,
        prefixes: PrefixCache,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(
            request,
            mixture,
            members,
            Reading([view.token_ids for view in views], max_new_tokens),
            method=method,
            grammar=grammar,
            prefixes=prefixes,
            loop=loop,
        )
        self._views = views
        self._prior = effective_weights(list(mixture.weights.values()))
        self._state = following.start(self._prior, mixture.share)  # what the weights of the first byte follow from
        self._spellers: list[Speller] = []  # at the end of the prompt, for choices to continue from
        self._num_fed = [0] * len(members)  # bytes of each tail
        self._tail_evidence: list[list[float]] = [[] for _ in members]
        self._num_asked: list[int] = []  # rows of each member in this step
        self._scoring: GivenReading | None = None  # of the prompt, if it was asked for
        self._alternatives: GivenAlternatives | None = None  # to its tokens, once these are scored
        self._is_ready = False
        self._untold_restarts: Counter[str] = Counter()  # of choices that have ended
        self._counts = np.zeros((len(members), 3), dtype=np.int64)  # rows, tokens, restarts of choices that have ended

    @property
    def is_reading(self) -> bool:
        return not self._is_ready

    @property
    def caches(self) -> Iterator[RowCache]:
        yield from super().caches
        if self._scoring is not None:
            yield from self._scoring.caches
        if self._alternatives is not None:
            yield from self._alternatives.caches
        for speller in self._spellers:
            yield speller.cache

    @property
    def kv_reserved(self) -> int:
        """Twice the prompt where it is scored: it is read for that, then for the answer."""
        return super().kv_reserved * (1 if self.request.prompt_logprobs is None else 2)

    @property
    def kv_of_choice(self) -> int:
        return answer_bytes(self.members, self._max_new_tokens * READ_PER_PIECE)

    def choice_spans(self, choice: Choice, spare: Spare) -> list[tuple[Member, Span]]:
        assert isinstance(choice, ByteChoice), "all that this kind starts are"
        return choice.next_spans(spare)

    @property
    def spelling(self) -> list[ByteChoice]:
        """Its live choices."""
        return [choice for choice in self.live if isinstance(choice, ByteChoice)]

    def kv_beyond(self, choice: ByteChoice) -> int:
        """Bytes that `choice` holds beyond what was asked for as many pieces; negative if it holds less."""
        rows = zip(self.members, choice.caches, self.token_ids, strict=True)
        claimed = READ_PER_PIECE * choice.num_generated
        return sum(
            (cache.length - len(ids) - claimed) * member.backbone.kv_bytes_per_token for member, cache, ids in rows
        )

    def _num_left(self, member: Member, cache: RowCache, choice: Choice) -> int:
        wanted = super()._num_left(member, cache, choice) * READ_PER_PIECE
        return max(0, min(wanted, member.max_model_len - cache.length))

    def begin(self) -> None:
        self.prompt = BytePrompt(self.members, [view.head for view in self._views], self.mixture, self._prefixes)
        if self.request.prompt_logprobs is not None:
            self._scoring = GivenReading(self.members, self._readings, self._text)

    @property
    def _readings(self) -> list[MemberReading]:
        return [begun(member, ids) for member, ids in zip(self.members, self.token_ids, strict=True)]

    @property
    def _text(self) -> bytes:
        """The prompt, which is raw text if it is scored."""
        token_bytes = self._views[0].vocabulary.token_bytes
        return b"".join(token_bytes[token_id] for token_id in self.token_ids[0])

    def next_spans(self, budget: int, being_read: dict[BlockKey, bool], spare: Spare) -> list[tuple[Member, Span]]:
        if self._scoring is not None:
            return self._scoring.next_spans(budget, spare)
        if self._alternatives is not None:
            return self._alternatives.next_spans(spare)
        if not self.prompt.is_done:
            return super().next_spans(budget, being_read, spare)
        pairs = []
        self._num_asked = []
        for member, speller in zip(self.members, self._spellers, strict=True):
            spans = speller.next_spans(spare)
            self._num_asked.append(len(spans))
            pairs += [(member, span) for span in spans]
        return pairs

    @torch.inference_mode()
    def take(self, rows: Sequence[torch.Tensor]) -> None:
        if self._scoring is not None:
            self._take_scoring(rows)
            return
        if self._alternatives is not None:
            self._take_alternatives(rows)
            return
        if not self.prompt.is_done:
            self._take_prompt(rows)
            if not self.prompt.is_done:
                return
            self._spellers = [
                Speller(
                    member,
                    view.vocabulary,
                    view.head,
                    cache,
                    logprobs,
                    begins_at=-len(view.tail),
                )
                for member, view, cache, logprobs in zip(
                    self.members, self._views, self.prompt.caches, self.prompt.last_logprobs, strict=True
                )
            ]
        else:
            begin = 0
            for speller, num in zip(self._spellers, self._num_asked, strict=True):
                speller.take(rows[begin : begin + num])
                begin += num
        self._heal()

    def start_choice(self) -> ByteChoice:
        """The next choice, on a copy of what was read; the last choice takes that itself."""
        is_last = self.num_started == self.num_choices - 1
        choice = ByteChoice(
            self.num_started,
            self.request,
            self.mixture,
            self._spellers if is_last else [speller.fork() for speller in self._spellers],
            state=self._state,
            prior=self._prior,
            max_new_tokens=self._max_new_tokens,
            grammar=None if self._grammar is None else self._grammar.new_mask(),
            rereads=[view.reread for view in self._views],
            prompt=self.token_ids[0],
        )
        self.num_started += 1
        self.live.append(choice)
        return choice

    def drain_restarts(self) -> Counter[str]:
        """How often each member began anew since this was asked last: in reading the prompt, and in all choices."""
        spellers = [*self._spellers, *(one for choice in self.live for one in _spellers_of(choice))]
        told, self._untold_restarts = self._untold_restarts, Counter()
        for speller in spellers:
            told[speller.member.name] += speller.drain_restarts()
        return told

    def _take_scoring(self, rows: Sequence[torch.Tensor]) -> None:
        assert self._scoring is not None, "the prompt is to be scored"
        self._scoring.take(rows)
        if not self._scoring.is_done:
            return
        judged, self._scoring = self._scoring.judgement(), None
        view = self._views[0]
        pieces = scored_pieces(judged, self.mixture, view.token_ids, view.vocabulary.token_bytes)
        if num := self.request.prompt_logprobs:
            alternatives = GivenAlternatives(self.members, self._readings, self._text, pieces, self.mixture, num)
            if not alternatives.is_done:
                self._alternatives = alternatives
                return
        self._have_scored(pieces)

    def _take_alternatives(self, rows: Sequence[torch.Tensor]) -> None:
        assert self._alternatives is not None, "alternatives are looked for"
        self._alternatives.take(rows)
        if self._alternatives.is_done:
            pieces, self._alternatives = self._alternatives.pieces, None
            self._have_scored(pieces)

    def _have_scored(self, pieces: list[TokenLogprob]) -> None:
        self.prompt.scored = pieces
        if not self.num_choices:
            self._is_ready = True
            self._begin_answering()

    def _heal(self) -> None:
        """Give each lattice the end of the prompt, as far as it goes without a forward."""
        for k, (speller, view) in enumerate(zip(self._spellers, self._views, strict=True)):
            while not speller.is_waiting:
                if self._num_fed[k] > len(self._tail_evidence[k]):
                    self._tail_evidence[k].append(speller.evidence)
                if self._num_fed[k] == len(view.tail):
                    break
                speller.feed(view.tail[self._num_fed[k]])
                self._num_fed[k] += 1
                if speller.is_lost and self._num_fed[k] == len(view.tail):
                    speller.restart(view.reread(""), 0)  # which it cannot write, but may read
        if any(speller.is_waiting for speller in self._spellers):
            return
        self._is_ready = True
        if self.mixture.pool == "posterior" and len(self.members) > 1:
            self._weigh()
        self._begin_answering()

    def _weigh(self) -> None:
        """Posterior weights after the longest common end of what members have read."""
        texts, nats = [], []
        for k, view in enumerate(self._views):
            text, of_head = self.prompt.evidence_of(k)
            texts.append(text + view.tail)
            nats.append(np.concatenate([of_head, self._tail_evidence[k]]))
        length = common_end(texts)
        evidence = np.stack([row[len(row) - length :] for row in nats])
        _, self._state = following.track(self._state, evidence, self._prior, self.mixture.share)

    def _ended(self, choice: Choice) -> None:
        for k, speller in enumerate(_spellers_of(choice)):
            self._untold_restarts[speller.member.name] += speller.drain_restarts()
            self._counts[k] += (speller.num_rows, speller.num_tokens, speller.num_restarts)

    @property
    def weights_after_prompt(self) -> np.ndarray:
        return following.member_weights(self._state, self.mixture.share)

    def _done(self) -> Done:
        return replace(super()._done(), vocabulary="bytes")

    def _trace(self) -> dict[str, Any] | None:
        """What members forwarded for the answers, too: rows, tokens in them, rows for each piece that was written."""
        if not self.request.explain:
            return None
        told = {
            member.name: {
                "rows": int(rows),
                "tokens": int(tokens),
                "rows_per_token": round(float(rows) / max(1, self._num_generated), 3),
                "restarts": int(restarts),
            }
            for member, (rows, tokens, restarts) in zip(self.members, self._counts, strict=True)
        }
        return (super()._trace() or {}) | {"members": told}


def _spellers_of(choice: Choice) -> Sequence[Speller]:
    assert isinstance(choice, ByteChoice), "all that this kind starts are"
    return choice.spellers
