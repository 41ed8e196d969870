"""One choice of one request, whatever engine draws its tokens: token ids in, what the client sees out.

    token → whole characters → stop strings → the end

A token that ends a choice (an end of text, a stop token) is counted, but is no part of its text, of its token ids or of
its log-probabilities. `ignore_eos` makes an end of text an ordinary token. Not so under a grammar: an end of text is
allowed there only where the text is complete, and stands for that. It ends the choice and is never shown, since with
it the text would no longer match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ensemble_server.ensembles.base import Delta, FinishReason, Sampling, TokenLogprob
from ensemble_server.server.engines.shared.stop_strings import StopStrings
from ensemble_server.server.engines.shared.thoughts import ThoughtLimit, ThoughtStream
from ensemble_server.server.weights.tokenizer import TextStream, Vocabulary


def ends_of_text(sampling: Sampling, eos_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end a choice without being named in the request."""
    return frozenset() if sampling.ignore_eos and sampling.grammar is None else eos_ids


class ChoiceText:
    """Not shared between choices. `max_new_tokens` >= 1; `eos_ids`: ends of text of any member; `thoughts`: of a
    model that thinks aloud; `thought_limit`: how long.

    `finish_reason` is set with the delta that has it; nothing may be added after that. `last_token`: the last one that
    was shown.
    """

    def __init__(
        self,
        index: int,
        sampling: Sampling,
        vocabulary: Vocabulary,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        thoughts: ThoughtStream | None = None,
        thought_limit: ThoughtLimit | None = None,
    ) -> None:
        self.index = index
        self.num_generated = 0
        self.num_reasoning = 0  # of them, tokens of a thought and its markers
        self.last_token: int | None = None
        self.finish_reason: FinishReason | None = None
        self._max_new_tokens = max_new_tokens
        self._min_tokens = sampling.min_tokens
        self._ends = ends_of_text(sampling, eos_ids)
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._thoughts = thoughts
        self._thought_limit = thought_limit
        markers = () if thoughts is None else (thoughts.markers.start, thoughts.markers.end)
        self._stream = TextStream(vocabulary, skip_special_tokens=sampling.skip_special_tokens, shown=markers)
        self._stops = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        # Special tokens that are left out of the text are met as tokens, where a stop string is one of them.
        hidden = vocabulary.special_ids if sampling.skip_special_tokens and sampling.stop else frozenset()
        ids = {vocabulary.token_ids.get(stop): stop for stop in sampling.stop} if hidden else {}
        self._stop_tokens = {token_id: stop for token_id, stop in ids.items() if token_id in hidden}

    def add_piece(self, token_id: int | None, data: bytes, report: TokenLogprob | None = None) -> Delta:
        """What bytes show that are known by themselves, and the token that they are (None: they are no whole one)."""
        self.num_generated += 1
        self.last_token = token_id
        ids = () if token_id is None else (token_id,)
        return self._told_apart(self._shown(self._stream.add_bytes(data), ids, report, is_complete=False))

    def add(self, token_id: int, report: TokenLogprob | None = None, *, is_complete: bool = False) -> Delta:
        """What the next token shows. `report`: what the client gets to know of it, if anything. `is_complete`: by the
        grammar, nothing may follow it.
        """
        self.num_generated += 1
        if token_id in self._ends:
            return self.end("stop")
        if token_id in self._stop_token_ids:
            return self.end("stop", token_id)
        if token_id in self._stop_tokens and self.num_generated >= self._min_tokens:
            return self.end("stop", self._stop_tokens[token_id])
        self.last_token = token_id
        return self._told_apart(self._shown(self._stream.add(token_id), (token_id,), report, is_complete=is_complete))

    @property
    def is_thinking(self) -> bool:
        """Whether what was added last is of a thought that goes on."""
        return self._thoughts is not None and self._thoughts.is_thinking

    def forced_token(self) -> int | None:
        """The token that must come next, because a thought has had its tokens; None: any may."""
        if self._thought_limit is None or not self.is_thinking:
            return None
        return self._thought_limit.next(self.num_reasoning)

    def end(self, finish_reason: FinishReason, stop_reason: str | int | None = None) -> Delta:
        """No token comes any more: the choice ends with what it has."""
        return self._told_apart(self._last(finish_reason, stop_reason))

    def expire(self) -> Delta:
        """The request's deadline has passed."""
        return self.end("length", "deadline")

    def _told_apart(self, delta: Delta) -> Delta:
        """With the thoughts of a model that thinks as its reasoning."""
        if self._thoughts is None:
            return delta
        was_thinking = self._thoughts.is_thinking
        answer, thought = self._thoughts.add(delta.text)
        if was_thinking or self._thoughts.is_thinking or thought:
            self.num_reasoning = self.num_generated
        if delta.finish_reason is not None:
            rest, rest_of_thought = self._thoughts.flush()
            answer, thought = answer + rest, thought + rest_of_thought
        return replace(delta, text=answer, reasoning=thought)

    def _shown(self, text: str, token_ids: tuple[int, ...], report: TokenLogprob | None, *, is_complete: bool) -> Delta:
        shown = Delta(self.index, text, token_ids, () if report is None else (report,))
        if self.num_generated >= self._min_tokens:
            text, stop = self._stops.add(shown.text)
            shown = replace(shown, text=text)
            if stop is not None:
                self.finish_reason = "stop"
                return replace(shown, finish_reason="stop", stop_reason=stop)
        if is_complete:
            return self._last("stop", None, shown)
        if self.num_generated >= self._max_new_tokens:
            return self._last("length", None, shown)
        return shown

    def _last(self, finish_reason: FinishReason, stop_reason: str | int | None, shown: Delta | None = None) -> Delta:
        """With what was held back. A stop string that only the very end completes cuts it, too."""
        self.finish_reason = finish_reason
        shown = Delta(self.index) if shown is None else shown
        tail, stop = self._stops.add(self._stream.flush())
        tail = tail if stop is not None else tail + self._stops.flush()
        return replace(shown, text=shown.text + tail, finish_reason=finish_reason, stop_reason=stop_reason)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Consecutive deltas of one choice, at least one, as one."""
    return Delta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        tuple(token for delta in deltas for token in delta.tokens),
        reasoning="".join(delta.reasoning for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
