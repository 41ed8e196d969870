"""One request for text inside the engine, from the queue to its last event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ensemble_server.ensembles.base import Delta, Done, GenerationRequest, Mixture, PromptScored
from ensemble_server.server.engines.shared import usage
from ensemble_server.server.engines.shared.grammar import CompiledGrammar
from ensemble_server.server.engines.shared.reading import Reading
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.byte_choice import ByteChoice
from ensemble_server.server.engines.transformers_engine.choice import LiveChoice
from ensemble_server.server.engines.transformers_engine.job import Job
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare, answer_bytes, growth, prompt_bytes
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import BlockKey, PrefixCache
from ensemble_server.server.engines.transformers_engine.prompt import Prompt
from ensemble_server.server.engines.transformers_engine.text_drafts import TextDrafts

Choice = LiveChoice | ByteChoice


class Generation(Job):
    """`grammar`: compiled; each choice follows a copy of it. `text_drafts`: of the prompt, if choices are to draft from
    their text. `prompt`: made when the job is admitted (`begin`)."""

    prompt: Prompt

    def __init__(
        self,
        request: GenerationRequest,
        mixture: Mixture,
        members: Sequence[Member],
        reading: Reading,
        *,
        method: str,
        grammar: CompiledGrammar | None,
        prefixes: PrefixCache,
        loop: asyncio.AbstractEventLoop,
        text_drafts: TextDrafts | None = None,
    ) -> None:
        super().__init__(
            members,
            loop,
            priority=request.priority,
            deadline_s=request.deadline_s,
            request_id=request.request_id,
        )
        self.request = request
        self.mixture = mixture
        self.token_ids = reading.prompts
        self.live: list[Choice] = []
        self.num_started = 0  # choices that have begun; the rest wait for free places
        self._method = method
        self._max_new_tokens = reading.max_new_tokens
        self._grammar = grammar
        self._prefixes = prefixes
        self._text_drafts = text_drafts
        self._eos_ids = frozenset().union(*(member.eos_ids for member in members))
        self._num_generated = 0
        self._num_reasoning = 0
        self._num_joint = 0
        self._drawn_weights = np.zeros(len(mixture.weights))
        self._reads: list[bool] = []  # which members read a chunk of the prompt in this step

    @property
    def num_choices(self) -> int:
        return self.request.n if self._max_new_tokens else 0

    @property
    def num_places(self) -> int:
        """One for each live choice; a request that has not begun to generate holds one for its prompt."""
        return max(1, len(self.live))

    @property
    def is_reading(self) -> bool:
        return not self.prompt.is_done

    @property
    def caches(self) -> Iterator[RowCache]:
        yield from self.prompt.caches
        for choice in self.live:
            yield from choice.caches

    @property
    def kv_reserved(self) -> int:
        if self.has_begun and not self.is_reading:
            return 0
        return sum(prompt_bytes(member, len(ids)) for member, ids in zip(self.members, self.token_ids, strict=True))

    @property
    def kv_left(self) -> int:
        if not self.live:
            return self.kv_of_choice if self.num_started < self.num_choices else 0
        return sum(
            growth(member, cache, self._num_left(member, cache, choice) + max(0, num_next - 1))
            for choice in self.live
            for member, cache, num_next in zip(choice.members, choice.caches, choice.num_next, strict=True)
        )

    @property
    def kv_of_choice(self) -> int:
        """Bytes that one more choice may come to take behind the prompt."""
        return answer_bytes(self.members, self._max_new_tokens)

    @property
    def kv_next(self) -> int:
        return sum(self.kv_step(choice) for choice in self.live)

    def kv_step(self, choice: Choice) -> int:
        """Bytes by which the caches of `choice` grow in the next step."""
        rows = zip(choice.members, choice.caches, choice.num_next, strict=True)
        return sum(growth(member, cache, num) for member, cache, num in rows)

    def choice_spans(self, choice: Choice, spare: Spare) -> list[tuple[Member, Span]]:
        """What its members read next for `choice`. `spare`: for rows of this step."""
        assert isinstance(choice, LiveChoice), "all that this kind starts are"
        return choice.next_spans()

    def _num_left(self, member: Member, cache: RowCache, choice: Choice) -> int:
        """How many tokens `member` has yet to read of a choice, at most."""
        return self._max_new_tokens - choice.num_generated

    def begin(self) -> None:
        self.prompt = Prompt(self.members, self.token_ids, self.mixture, self.request.prompt_logprobs, self._prefixes)

    def next_spans(self, budget: int, being_read: dict[BlockKey, bool], spare: Spare) -> list[tuple[Member, Span]]:
        spans = self.prompt.next_spans(budget, being_read)
        self._reads = [span is not None for span in spans]
        return [(member, span) for member, span in zip(self.members, spans, strict=True) if span is not None]

    def take(self, rows: Sequence[torch.Tensor]) -> None:
        self._take_prompt(rows)
        if not self.is_reading:
            self._begin_answering()

    def _take_prompt(self, rows: Sequence[torch.Tensor]) -> None:
        results = iter(rows)
        self.prompt.take([next(results) if reads else None for reads in self._reads])

    def _begin_answering(self) -> None:
        """The prompt is read: say so, and end here if nothing is to be generated."""
        self.outbox.append(PromptScored(tuple(self.token_ids[0]), tuple(self.prompt.scored), self.waited_s))
        for index in range(self.request.n if not self._max_new_tokens else 0):
            self.outbox.append(Delta(index, finish_reason="length"))
        if not self.num_choices:
            self._finish()

    def start_choice(self) -> Choice:
        """The next choice, on a copy of the prompt's caches; the last choice takes the caches themselves."""
        is_last = self.num_started == self.num_choices - 1
        caches = self.prompt.caches if is_last else [cache.fork() for cache in self.prompt.caches]
        choice = LiveChoice(
            self.num_started,
            self.request,
            self.mixture,
            self.prompt,
            caches,
            max_new_tokens=self._max_new_tokens,
            eos_ids=self._eos_ids,
            grammar=None if self._grammar is None else self._grammar.new_mask(),
            text_drafts=None if self._text_drafts is None else self._text_drafts.fork(),
        )
        self.num_started += 1
        self.live.append(choice)
        return choice

    def emit(self, choice: Choice, delta: Delta) -> None:
        self.outbox.append(delta)
        if choice.finish_reason is None:
            return
        self._num_generated += choice.num_generated
        self._num_reasoning += choice.num_reasoning
        if isinstance(choice, LiveChoice):
            self._num_joint += choice.num_joint
            self._drawn_weights += choice.drawn_weights
        self.live.remove(choice)
        self._ended(choice)
        if not self.live and self.num_started == self.num_choices:
            self._finish()

    def expire(self) -> None:
        """End every choice, begun or not, with what it has; with nothing at all it is a `DeadlineError`."""
        if not self.num_started:
            super().expire()
            return
        for index in range(self.num_started, self.num_choices):
            self.num_started += 1
            self.outbox.append(Delta(index, finish_reason="length", stop_reason="deadline"))
        for choice in list(self.live):
            self.emit(choice, choice.expire())
        if not self.is_finished:
            self._finish()

    def _finish(self) -> None:
        self.outbox.append(self._done())
        self.is_finished = True

    def _ended(self, choice: Choice) -> None:
        """`choice` is over: for kinds that count what it took."""

    def _done(self) -> Done:
        num_read = {member.name: len(ids) for member, ids in zip(self.members, self.token_ids, strict=True)}
        done = usage.done(self._method, num_read, self._num_generated, self._num_reasoning)
        if self._is_selective:
            done = usage.with_joint(done, self.mixture.main, self._num_joint)
        is_gated = self.mixture.gate is not None and len(self.members) > 1
        return replace(done, trace=self._trace(), is_gated=is_gated)

    @property
    def _is_selective(self) -> bool:
        return self.mixture.when is not None and len(self.members) > 1

    def _trace(self) -> dict[str, Any] | None:
        """If it was asked to explain: of a posterior pool, whom the config trusts and whom the prompt speaks for, and
        with a gate, with which weights tokens were drawn in the mean; of a
        selective average, who wrote, and how many tokens came from the pool."""
        if not self.request.explain or len(self.members) == 1:
            return None
        trace = {} if self.mixture.pool != "posterior" else self._trace_of_weights()
        if self.mixture.when is not None:
            trace["when"] = {
                **self.mixture.when.model_dump(exclude_none=True),
                "main": self.mixture.main,
                "tokens": self._num_generated,
                "pooled_tokens": self._num_joint,
            }
        return trace or None

    def _trace_of_weights(self) -> dict[str, Any]:

        def by_name(weights: np.ndarray) -> dict[str, float]:
            return dict(zip((member.name for member in self.members), map(float, weights), strict=True))

        weights = {"prior": by_name(self.prompt.prior), "after_prompt": by_name(self.weights_after_prompt)}
        if self.mixture.gate is not None and self._drawn_weights.any():
            weights["drawn"] = by_name(self._drawn_weights / self._drawn_weights.sum())
        return {"weights": weights}

    @property
    def weights_after_prompt(self) -> np.ndarray:
        """(K,), of the first token that is drawn."""
        return self.prompt.weights
