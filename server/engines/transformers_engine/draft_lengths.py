"""How much of what could be drafted is worth its time in one step, all choices together.

    maximise    (choices + expected right tokens) / seconds of the step

A step's seconds are the sum over its forwards: those of members that write drafts, one after the other, and that in
which all members read. A prompt that is read in the same step delays it in any case: what drafts cost is added to a
step of choices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.scheduler import Work
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts


@dataclass(frozen=True)
class TextDraft:
    """What may come behind the last token of `work[index]`; `chances`: that the first, the first two, ... are right."""

    index: int
    token_ids: Sequence[int]
    chances: Sequence[float]


@dataclass(frozen=True)
class Writer:
    """Member `drafter` may write up to `max_tokens` ahead of `work[index]`; `chance`: that a token is right if those
    before it were."""

    index: int
    drafter: int
    chance: float
    max_tokens: int

    def length(self, wanted: int) -> int:
        return min(wanted, self.max_tokens)

    def expected(self, wanted: int) -> float:
        """How many of its tokens are right, if it writes as many as are wanted."""
        return float((self.chance ** np.arange(1, self.length(wanted) + 1)).sum())


@dataclass(frozen=True)
class Plan:
    """`texts`, each with its length (0: not read); `writers`, which write `length` tokens. `speed`: tokens a second."""

    speed: float
    texts: Sequence[tuple[TextDraft, int]]
    writers: Sequence[Writer] = ()
    length: int = 0


class Outlook:
    """A step without drafts: what it forwards, and what more would cost.

    `num_spare`: how many tokens (over all members) background work may have more.
    """

    def __init__(self, work: Sequence[Work], costs_of: Callable[[Backbone], StepCosts], num_spare: float) -> None:
        self._backbones = list({member.backbone: None for item in work for member, _ in item.spans})
        self._costs = [costs_of(backbone) for backbone in self._backbones]
        self._column = {backbone: b for b, backbone in enumerate(self._backbones)}
        shape = (len(work), len(self._backbones))
        planned = np.zeros(shape)
        self._widths = np.zeros(shape)  # what one token more of a choice is to each backbone
        for i, item in enumerate(work):
            for member, span in item.spans:
                planned[i, self._column[member.backbone]] += len(span.token_ids)
                self._widths[i, self._column[member.backbone]] += 1
        is_choice = np.array([item.choice is not None for item in work])
        self._planned, self._of_choices = planned.sum(0), planned[is_choice].sum(0)
        self._num_choices = int(is_choice.sum())
        self._is_background = np.array([item.job.priority > 0 for item in work])
        self._num_spare = num_spare
        self._work = work

    def best(self, texts: Sequence[TextDraft], writers: Sequence[Writer], max_written: int) -> Plan:
        best = self._with_texts(texts, (), 0)
        for length in range(1, max_written + 1 if writers else 1):
            writing = self._writing(writers, texts, length)
            if writing:
                indices = {writer.index for writer in writing}
                rest = [text for text in texts if text.index not in indices]
                best = max(best, self._with_texts(rest, writing, length), key=lambda plan: plan.speed)
        return best

    def _writing(self, writers: Sequence[Writer], texts: Sequence[TextDraft], length: int) -> list[Writer]:
        """Those that expect more than the text of their choice does, as far as background work has room for them."""
        from_text = {text.index: sum(text.chances[:length]) for text in texts}
        writing, num_spare = [], self._num_spare
        for writer in writers:
            if from_text.get(writer.index, 0.0) >= writer.expected(length):
                continue
            if self._is_background[writer.index]:
                num_spare -= writer.length(length) * self._widths[writer.index].sum()
                if num_spare < 0:
                    break
            writing.append(writer)
        return writing

    def _with_texts(self, texts: Sequence[TextDraft], writers: Sequence[Writer], length: int) -> Plan:
        """The best lengths of `texts` beside `writers` that write so much."""
        planned, num_spare = self._planned.copy(), self._num_spare
        expected = self._num_choices + sum(writer.expected(length) for writer in writers)
        writing = np.zeros((length, len(self._backbones)))  # tokens of each forward of those that write
        for writer in writers:
            column = self._column[self._work[writer.index].spans[writer.drafter][0].backbone]
            read = self._widths[writer.index] * writer.length(length)
            writing[: writer.length(length), column] += 1
            planned += read
            planned[column] -= writer.length(length)  # it reads the last of them only, in place of the last token
            num_spare -= read.sum() if self._is_background[writer.index] else 0

        chances = np.concatenate([np.empty(0), *(text.chances for text in texts)])
        owners = np.repeat(np.arange(len(texts)), [len(text.chances) for text in texts])
        order = np.argsort(-chances, kind="stable")  # within a draft they fall, so that its beginning comes first
        indices = np.array([text.index for text in texts], dtype=int)[owners[order]]
        widths = self._widths[indices]
        in_background = self._is_background[indices]
        fits = ~in_background | ((widths.sum(1) * in_background).cumsum() <= num_spare)
        order, widths = order[fits], widths[fits]

        num_tokens = planned + np.concatenate([np.zeros((1, len(self._backbones))), widths.cumsum(0)])
        seconds = np.zeros(len(num_tokens))
        for b, costs in enumerate(self._costs):
            without, alone = costs.seconds(np.array([self._planned[b], self._of_choices[b]]))
            seconds += costs.seconds(num_tokens[:, b]) - without + (alone if self._of_choices[b] else 0.0)
            seconds += costs.seconds(writing[writing[:, b] > 0, b]).sum()
        speeds = (expected + np.concatenate([[0.0], chances[order].cumsum()])) / seconds
        num_read = int(np.argmax(speeds))
        lengths = np.bincount(owners[order[:num_read]], minlength=len(texts)).tolist()
        return Plan(float(speeds[num_read]), list(zip(texts, lengths, strict=True)), writers, length)
